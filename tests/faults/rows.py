"""The rows of the fault table: what is broken, where, and what must come of it. `injected.py` plays them."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.broken_runs import INTERVAL, ROOT, STEPS, Ended, Workshop, differences, last_step

PLUGIN = {"plugins": ["tests.faults.points"]}
"""In the recipe of every run, also of those that nothing happens to."""


LAST_LINES = 12
"""A run's summary is ten lines, and what comes from standard error may be before or behind it."""


class NotPossibleHereError(Exception):
    """This machine cannot break a run in this way."""


@dataclass
class Outcome:
    """What came of a row; `wrong` lists what is not as it should be."""

    sees: str
    status: int
    lost: int | None = None
    bitwise: bool | None = None
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One fault at one point.

    Attributes:
        play: breaks a run in a folder of its own, gives the command again, and judges.
        quick: one of the few of its fault that `--quick` plays.
    """

    fault: str
    point: str
    ranks: int
    play: Callable[[Workshop, Path], Outcome]
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.point}, {self.ranks} ranks"


@contextlib.contextmanager
def ordinary(base: Path) -> Iterator[Path]:
    """A folder on the ordinary disk."""
    yield base / "run"


@contextlib.contextmanager
def small_disk(base: Path, size_mib: int = 24) -> Iterator[Path]:
    """A folder on a disk that can be filled: a tmpfs of its own."""
    disk = base / "disk"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", disk)
    try:
        yield disk / "run"
    finally:
        run("umount", disk)


def run(*words: Any) -> None:
    """A command that this machine may not allow."""
    try:
        subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotPossibleHereError(f"{words[0]}: {getattr(error, 'stderr', '') or error}".strip()) from None


def judge_screen(ended: Ended, *, status: int, sees: str, last: bool, wrong: list[str]) -> str:
    """The lines that the user is to see; what is wrong with status and screen goes to `wrong`."""
    lines = ended.lines[-LAST_LINES:] if last else ended.lines
    shown = [line for line in lines if re.search(sees, line)]
    if ended.status != status:
        wrong.append(f"status {ended.status} instead of {status}")
    if not shown:
        wrong.append(f"no line with /{sees}/ {'among the last ones' if last else 'on the screen'}")
    if "Traceback (most recent call last)" in ended.screen:
        wrong.append("a traceback on the screen")
    if ended.survivors:
        wrong.append(f"{ended.survivors} processes were still there")
    return " / ".join(shown[:2] or ended.lines[-2:])


def go_on(
    shop: Workshop, folder: Path, ranks: int, settings: dict[str, Any], environ: dict[str, str], wrong: list[str]
) -> Ended:
    """Gives the command again; it must end well."""
    ended = shop.launch(folder, ranks, {**PLUGIN, **settings}, **environ).wait()
    if ended.status != 0:
        wrong.append(f"the same command then ended with {ended.status}: {' / '.join(ended.lines[-2:])}")
    if "Traceback (most recent call last)" in ended.screen:
        wrong.append("a traceback on the screen of the second run")
    return ended


def compare(shop: Workshop, folder: Path, ranks: int, wrong: list[str]) -> bool:
    """Whether the run left what an unbroken one leaves, bit for bit."""
    different = differences(folder, shop.whole(ranks, PLUGIN))
    wrong += different
    return not different


def injected(
    fault: str,
    point: str,
    where: str,
    *,
    ranks: int = 2,
    status: int = 1,
    sees: str,
    settings: dict[str, Any] | None = None,
    place: Callable[[Path], Any] = ordinary,
    environ: Callable[[Path], dict[str, str]] = lambda base: {},
    mend: Callable[[Path], None] = lambda folder: None,
    allowed: int = INTERVAL,
    bitwise: bool = True,
    within_seconds: float | None = None,
    quick: bool = False,
) -> Row:
    """A row whose fault happens in a rank, by `points`.

    Args:
        where: the `TITAN_FAULT`.
        sees: what must be among the last lines on the screen.
        place: the file system of the run.
        mend: makes good what would break the next run too.
        allowed: steps that may be lost.
        bitwise: whether the run must be the unbroken one in the end; it is not when batches are left out.
        within_seconds: of the fault, the launcher must have ended.
    """

    def play(shop: Workshop, base: Path) -> Outcome:
        control = base / "control"
        control.mkdir()
        more, wrong = environ(base), []
        with place(base) as folder:
            broken = shop.launch(
                folder,
                ranks,
                {**PLUGIN, **(settings or {})},
                TITAN_FAULT=where,
                TITAN_FAULT_CONTROL=str(control),
                TITAN_FAULT_FOLDER=str(folder),
                **more,
            ).wait()
            ended_at = time.monotonic()
            outcome = Outcome(
                judge_screen(broken, status=status, sees=sees, last=broken.status != 0, wrong=wrong), broken.status
            )
            if not (control / "fired").exists():
                wrong.append(f"{where} was never reached")
            elif within_seconds is not None:
                waited = ended_at - float((control / "when").read_text().split()[0])
                outcome.sees += f" ({waited:.0f} s after it)"
                if waited > within_seconds:
                    wrong.append(f"{waited:.0f} s passed, not {within_seconds:g}")
            reached = last_step(folder)
            mend(folder)
            resumed = broken
            if broken.status != 0:
                resumed = go_on(shop, folder, ranks, settings or {}, more, wrong)
                outcome.lost = reached - resumed.resumed_from
            elif (control / "when").exists():  # it went on by itself, if need be from a checkpoint
                during = int((control / "when").read_text().split()[1])
                outcome.lost = during - 1 - broken.resumed_from if broken.resumed_from else 0
            if outcome.lost is not None and outcome.lost > allowed:
                wrong.append(f"{outcome.lost} steps lost, not at most {allowed}")
            if bitwise and resumed.status == 0:
                outcome.bitwise = compare(shop, folder, ranks, wrong)
            elif resumed.status == 0 and last_step(folder) != STEPS:
                wrong.append(f"the run came to step {last_step(folder)}, not {STEPS}")
        outcome.wrong = wrong
        return outcome

    return Row(fault, point, ranks, play, quick)


def stopped_at_step_11(shop: Workshop, ranks: int) -> Path:
    """A run that was killed after step 11, with checkpoints of steps 5, 6 and 9. Made once, to be copied."""
    folder = shop.folder / f"stopped-{ranks}" / "run"
    if not folder.exists():
        (folder.parent / "control").mkdir(parents=True)
        environ = {"TITAN_FAULT": "forward:12:all:kill", "TITAN_FAULT_CONTROL": str(folder.parent / "control")}
        ended = shop.launch(folder, ranks, PLUGIN, **environ).wait()
        assert ended.status == 1, ended.screen
    assert last_step(folder) == 11
    assert {path.name for path in (folder / "checkpoint").glob("*-*")} == {"step-5", "step-6", "step-9"}
    return folder


def damaged(
    fault: str,
    point: str,
    damage: Callable[[Path], None],
    *,
    sees: str,
    ranks: int = 2,
    resumes_from: int = 6,
    status: int = 0,
    quick: bool = False,
) -> Row:
    """A row that damages the checkpoints of a stopped run; those before must do.

    Args:
        damage: is given the run's checkpoint folder.
        sees: what must be on the screen of the run that goes on.
        status: of that run; other than 0, no checkpoint may have been touched.
    """

    def play(shop: Workshop, base: Path) -> Outcome:
        folder, wrong = base / "run", []
        shutil.copytree(stopped_at_step_11(shop, ranks), folder)
        damage(folder / "checkpoint")
        before = contents(folder / "checkpoint")
        ended = shop.launch(folder, ranks, PLUGIN).wait()
        outcome = Outcome(judge_screen(ended, status=status, sees=sees, last=status != 0, wrong=wrong), ended.status)
        if status == 0:
            outcome.lost = 11 - ended.resumed_from
            if ended.resumed_from != resumes_from:
                wrong.append(f"resumed from step {ended.resumed_from}, not {resumes_from}")
            if ended.status == 0:
                outcome.bitwise = compare(shop, folder, ranks, wrong)
        elif contents(folder / "checkpoint") != before:
            wrong.append("the checkpoints are not what they were")
        outcome.wrong = wrong
        return outcome

    return Row(fault, point, ranks, play, quick)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_bit(path: Path, *, share: float | None = None, after: bytes = b"") -> None:
    """Turns the lowest bit of one byte: at a share of the file, or right behind a text."""
    data = bytearray(path.read_bytes())
    position = data.index(after) + len(after) if share is None else int(share * (len(data) - 1))
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path, num_bytes: int) -> None:
    """Cuts bytes off the end."""
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - num_bytes)


def in_newest(then: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage to the newest checkpoint, step-9."""
    return lambda checkpoints: then(checkpoints / "step-9")


def read_only(*, resumes: bool) -> Row:
    """A run folder on a read-only mount; with `resumes`, of a run that is half done."""

    def play(shop: Workshop, base: Path) -> Outcome:
        folder, wrong = base / "run", []
        if resumes:
            shutil.copytree(stopped_at_step_11(shop, 2), folder)
        folder.mkdir(exist_ok=True)
        run("mount", "--bind", folder, folder)
        try:
            run("mount", "-o", "remount,ro,bind", folder)
            ended = shop.launch(folder, 2, PLUGIN).wait()
        finally:
            run("umount", folder)
        sees = judge_screen(ended, status=2, sees="Read-only file system", last=True, wrong=wrong)
        outcome = Outcome(sees, ended.status, wrong=wrong)
        again = go_on(shop, folder, 2, {}, {}, wrong)
        outcome.lost = (11 - again.resumed_from) if resumes else 0
        outcome.bitwise = again.status == 0 and compare(shop, folder, 2, wrong)
        return outcome

    return Row("read-only folder", "before a resume" if resumes else "before the start", 2, play, quick=not resumes)


def full_from_the_start() -> Row:
    """No room at all before the run starts."""

    def play(shop: Workshop, base: Path) -> Outcome:
        wrong: list[str] = []
        with small_disk(base) as folder:
            filler = folder.parent / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            ended = shop.launch(folder, 2, PLUGIN).wait()
            sees = judge_screen(ended, status=2, sees="(No space left|Make room)", last=True, wrong=wrong)
            filler.unlink()
            again = go_on(shop, folder, 2, {}, {}, wrong)
            same = again.status == 0 and compare(shop, folder, 2, wrong)
        return Outcome(sees, ended.status, 0, same, wrong)

    return Row("disk full", "before the start", 2, play)


def two_runs(point: str, where: str | None, quick: bool = False) -> Row:
    """A second run on the folder of a first one, which waits at a point; without one, both start in one instant."""

    def play(shop: Workshop, base: Path) -> Outcome:
        folder, control, wrong = base / "run", base / "control", []
        control.mkdir()
        environ = {"TITAN_FAULT": where or "", "TITAN_FAULT_CONTROL": str(control)}
        first = shop.launch(folder, 2, PLUGIN, **environ)
        deadline = time.monotonic() + 90
        while where and not (control / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = shop.launch(folder, 2, PLUGIN)
        if where:
            other = second.wait()
            (control / "go").touch()
            won = first.wait()
        else:
            ends = sorted([first.wait(), second.wait()], key=lambda ended: ended.status)
            won, other = ends
        sees = judge_screen(other, status=2, sees="in use by", last=True, wrong=wrong)
        if won.status != 0:
            wrong.append(f"the first run ended with {won.status}: {' / '.join(won.lines[-2:])}")
        same = won.status == 0 and compare(shop, folder, 2, wrong)
        return Outcome(sees, other.status, 0, same, wrong)

    return Row("two runs on one folder", point, 2, play, quick)


def clock_that_can_be_set(base: Path) -> dict[str, str]:
    """The environment of a run whose wall-clock `points` can set back."""
    library, offset = base / "clock.so", base / "clock"
    run("cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests" / "faults" / "clock.c")
    offset.write_bytes(struct.pack("q", 0))
    return {"LD_PRELOAD": str(library), "FAULT_CLOCK": str(offset)}
