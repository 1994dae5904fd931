"""Damages each file of a run in each way, starts the run again, and judges what becomes of it.

    python -m tests.faults.lost_files [PART_OF_A_NAME ...]

Every file that a run leaves in its folder and its checkpoints is truncated, deleted, emptied, written anew by another
tool, replaced by a folder, and made unreadable (a link to itself: permissions do not bind root). With one checkpoint
and with three, on a disk and in a store. Then come the same command's preflight and ranks, in one forked process. A row
fails when the run starts from scratch, when there is a traceback, or when nothing on the screen names what was damaged.
Without names, all are run (several minutes) and docs/generated/lost_files.md is written. Status 1 when a row fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import storage
from tests.faults.bad_inputs import cell
from tests.harness import run_ranks
from tests.recipes.judge import CHECKOUT
from tests.runs import make_recipe, read_metrics, train
from titan_growth.config.loader import to_toml

PAGE = CHECKOUT / "docs" / "generated" / "lost_files.md"
STEPS_DONE, STEPS = 6, 8
BUCKET = "bucket://runs/checkpoint"

Damage = Callable[[Path], None]


def _rewrite(path: Path) -> None:
    """As an editor or a sync tool leaves it: the same content, laid out its own way, with new times."""
    data = path.read_bytes()
    try:
        path.write_bytes(json.dumps(json.loads(data), indent=3).encode())
    except ValueError:
        path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES: dict[str, Damage] = {
    "truncated": _truncate,
    "deleted": Path.unlink,
    "written anew": _rewrite,
    "emptied": lambda path: path.write_bytes(b""),
    "a folder": _make_folder,
    "unreadable": _make_unreadable,
}

MADE_ANEW = ("recipe.toml", "exit.json", ".lock", "events.out")
"""Of the run's folder: every start writes them anew, and nothing depends on what was there."""


@dataclass(frozen=True)
class Case:
    """One file damaged in one way."""

    num_checkpoints: int
    remote: bool
    file: str
    damage: str

    @property
    def name(self) -> str:
        place = "store" if self.remote else "disk"
        return f"{self.file} {self.damage}, {self.num_checkpoints} checkpoint{'s'[: self.num_checkpoints - 1]}, {place}"


@dataclass(frozen=True)
class Row:
    """A case with its outcome; `wrong` lists what is not as it should be."""

    case: Case
    status: int
    screen: str
    wrong: list[str]

    @property
    def message(self) -> str:
        """The lines that tell of the damage, or how the run went on."""
        tells = re.compile(r"error:|refused|cannot|lost|missing|kept")
        lines = [
            re.sub(r"^\S*\d\d:\d\d:\d\d\S*\s+", "", line) for line in self.screen.splitlines() if tells.search(line)
        ]
        return " / ".join(list(dict.fromkeys(lines))[:2])


def _settings(num_checkpoints: int, remote: bool) -> dict[str, Any]:
    return {
        "model__n_layers": 1,
        "checkpoint__enable": True,
        "checkpoint__interval": 2 if num_checkpoints == 3 else STEPS_DONE,
        "checkpoint__folder": BUCKET if remote else "checkpoint",
        "checkpoint__save_retries": 0,
        "metrics__enable_tensorboard": False,
    }


class Template:
    """A run of six steps with its checkpoints, kept as files also where they are in a store."""

    def __init__(self, folder: Path, num_checkpoints: int, remote: bool) -> None:
        self.folder = folder
        self.settings = _settings(num_checkpoints, remote)
        self.remote = remote
        folder.mkdir()
        storage.register()
        recipe = make_recipe(folder / "run", **self.settings, training__steps=STEPS_DONE)
        run_ranks(_train_and_unload, 1, recipe, folder)
        # What only the launcher's ranks leave.
        (folder / "run" / "exit.json").write_text(json.dumps({"status": 0, "launch": "x", "attempt": 0}))

    def files(self) -> list[str]:
        """The files of the run's folder and of its newest checkpoint."""
        places = [path.relative_to(self.folder).as_posix() for path in sorted(self.folder.rglob("*")) if path.is_file()]
        older = re.compile(rf"/step-(?!{STEPS_DONE}/)\d+/")
        found = [place for place in places if place.startswith(("run/", "store/")) and not older.search(place)]
        return [place for place in found if not self.remote or place.startswith("store/")]


def _train_and_unload(rank: int, recipe: Any, folder: Path) -> None:
    storage.register()
    train(0, 1, recipe)
    for key, content in storage.BucketFileSystem.objects.items():
        path = folder / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _load(folder: Path) -> None:
    """Fills the store of this process. What is unreadable on the disk is so in the store."""
    store = folder / "store"
    closed = set()
    for path in store.rglob("*"):
        key = path.relative_to(store).as_posix()
        if path.is_symlink():
            closed.add(key)
            storage.BucketFileSystem.objects[key] = b"?"
        elif path.is_file():
            storage.BucketFileSystem.objects[key] = path.read_bytes()
        elif not any(path.iterdir()):
            storage.BucketFileSystem.objects[f"{key}/something"] = b"x"

    def forbid(path: str, start: int, end: int) -> None:
        if path in closed:
            raise PermissionError(13, "Permission denied", path)

    storage.BucketFileSystem.before_fetch = staticmethod(forbid)


def _start(rank: int, folder: Path, argv: list[str]) -> tuple[int, str]:
    """Preflight and ranks of one launch, as `run_train.sh` calls them; (status, screen)."""
    from titan_growth.commands.check import main as check
    from titan_growth.config.loader import load_recipe
    from titan_growth.tools.errors import TitanGrowthError
    from titan_growth.tools.logs import setup_logging

    storage.register()
    _load(folder)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        status = check(argv)
        if status == 0:
            setup_logging()
            try:
                train(0, 1, load_recipe(argv))
            except TitanGrowthError as error:
                status = error.exit_status
                print(f"error: {error}")
    return status, screen.getvalue()


def play(case: Case, template: Template, folder: Path) -> Row:
    """Runs one case in a folder of its own."""
    shutil.copytree(template.folder, folder, symlinks=True)
    DAMAGES[case.damage](folder / case.file)
    recipe = make_recipe(folder / "run", **template.settings, training__steps=STEPS)
    config = folder / "recipe-of-the-user.toml"
    config.write_text(to_toml(recipe))
    before = _steps_of(template.folder / "run")
    try:
        status, screen = run_ranks(_start, 1, folder, ["--job.config_file", str(config)])[0]
    except AssertionError as error:
        return Row(case, -1, str(error), ["traceback"])
    screen = screen.replace(str(folder), "...")
    after = _steps_of(folder / "run") if status == 0 else before
    went_on = after[: len(before)] == before or len(after) < len(before)
    wrong = []
    if "Traceback" in screen:
        wrong.append("traceback")
    if status == 0 and (not went_on or list((folder / "run").glob("metrics.jsonl.old-*"))):
        wrong.append("started from scratch")
    if status == 0 and after[-1:] != [STEPS]:
        wrong.append("did not reach the last step")
    if status not in (0, 1, 2):
        wrong.append(f"status {status}")
    if not _is_told(case, screen):
        wrong.append("silent")
    return Row(case, status, screen, wrong)


def _is_told(case: Case, screen: str) -> bool:
    """Whether the screen names what was damaged, where anything depends on it."""
    place = case.file.split("/", 1)[1]
    if case.damage == "written anew" or any(f"{place} {case.damage}".startswith(name) for name in MADE_ANEW):
        return True
    name = place.rsplit("/", 1)[-1]
    step = re.search(r"step-\d+", place)
    return name in screen or (step is not None and f"{step[0]} refused" in screen)


def _steps_of(run: Path) -> list[int]:
    """The steps in metrics.jsonl, in order."""
    try:
        return [line["step"] for line in read_metrics(run)]
    except OSError:
        return []


def templates(folder: Path) -> dict[tuple[int, bool], Template]:
    """The runs that the cases start from."""
    return {
        (count, remote): Template(folder / f"{count}-{'store' if remote else 'disk'}", count, remote)
        for count in (1, 3)
        for remote in (False, True)
    }


def cases(made: dict[tuple[int, bool], Template]) -> Iterator[Case]:
    """Each file of each run, damaged in each way."""
    for (count, remote), template in made.items():
        for file in template.files():
            yield from (Case(count, remote, file, damage) for damage in DAMAGES)


def page(rows: list[Row]) -> str:
    """The page."""
    good = sum(not row.wrong for row in rows)
    lines = [
        "# Lost and damaged files",
        "",
        f"Every file of a run damaged in every way, and the same command given again: {len(rows)} rows, of which",
        f"{good} end as they should. None may start from scratch, none be silent where anything depends on the file.",
        "Status 0: the run goes on from the newest checkpoint that is whole. Status 2: nothing was started, and the",
        "message says why.",
        "Written by `python -m tests.faults.lost_files`; `...` is the case's own folder.",
        "",
        "| file | damage | checkpoints | where | status | what the screen says of it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        flaw = f" **{'; '.join(row.wrong)}**" if row.wrong else ""
        case, text = row.case, cell(row.message)
        where = "store" if case.remote else "disk"
        file = case.file.split("/", 1)[1]
        lines.append(f"| `{file}` | {case.damage} | {case.num_checkpoints} | {where} | {row.status} | {text}{flaw} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the cases; returns 1 when one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only cases with one of these in their names; writes no page")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as root:
        os.environ["TITAN_GROWTH_CACHE"] = str(Path(root) / "cache")
        made, rows = templates(Path(root)), []
        for number, case in enumerate(cases(made)):
            if args.names and not any(part in case.name for part in args.names):
                continue
            row = play(case, made[case.num_checkpoints, case.remote], Path(root) / f"case-{number}")
            shutil.rmtree(Path(root) / f"case-{number}")
            verdict = "BAD" if row.wrong else "ok "
            print(f"{verdict} {row.status} {case.name}: {row.wrong or ''} {row.message}", flush=True)
            rows.append(row)
    if not args.names:
        PAGE.write_text(page(rows))
    bad = sum(bool(row.wrong) for row in rows)
    print(f"{len(rows)} rows, {bad} not as they should be")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
