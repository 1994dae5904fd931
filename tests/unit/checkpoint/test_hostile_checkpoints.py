"""Hostile checkpoints: nothing in them is executed, each is refused in one line, and the run continues without.

Every case has a manifest that matches its files, since an attacker writes the checksums too. Each is tried in several
ways, such as the newest checkpoint of a resuming run, `verify` and `checkpoint.initial_load_path`, in a child process
with little memory and time.
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.runs import make_recipe, train
from tests.unit.confined import Confined
from tests.unit.hostile import Bomb, signed
from tests.unit.hostile_files import CASES, NOT_FOR_A_START
from titan_growth.checkpoint.folder import open_step, root_of
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.rewind import RollBackError
from titan_growth.checkpoint.search import find_checkpoint
from titan_growth.commands.check import preflight as preflight_main
from titan_growth.commands.lineage import main as lineage_main
from titan_growth.commands.source import open_source
from titan_growth.commands.verify import main as verify_main
from titan_growth.config.loader import with_values
from titan_growth.config.schema.recipe import CheckpointConfig, Recipe
from titan_growth.run.vet import problem_of
from titan_growth.tools.errors import TitanGrowthError

REFUSED = re.compile(r"step-\d+ refused: [^\n]+")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A run folder with the steps 2 and 4, and its recipe."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    growth = {"growth__stages__0__at": "1 step", "growth__stages__0__factor": 2}
    checkpoint = {"checkpoint__enable": True, "checkpoint__interval": 2}
    recipe = make_recipe(folder, model__n_layers=2, model__dim=16, training__steps=4, **checkpoint, **growth)
    run_ranks(train, 1, 1, recipe)
    return folder, recipe


def copied(honest: tuple[Path, Recipe], to: Path) -> tuple[Path, Recipe]:
    """A copy of the run, and its recipe with one more step."""
    shutil.copytree(honest[0], to / "run", symlinks=True)
    return to / "run", with_values(honest[1], {"job.dump_folder": str(to / "run"), "training.steps": 5})


@pytest.fixture(scope="module")
def children() -> Iterator[list[Confined]]:
    """The current child process."""
    found: list[Confined] = []
    yield found
    for child in found:
        child.close()


@pytest.fixture
def confined(children: list[Confined]) -> Callable[..., Any]:
    """Calls a function in a child process with little memory and time; starts a new one after a failure."""

    def call(*args: Any, **options: Any) -> Any:
        if not children:
            children.append(Confined())
        try:
            return children[-1].call(*args, **options)
        except BaseException:
            children.pop().close()
            raise

    return call


def found_by_resume(recipe: Recipe) -> tuple[int, list[str]]:
    """(the step a run resumes from, a line per refused checkpoint)."""
    section = recipe.checkpoint
    found = find_checkpoint(section, root_of(section.folder, Path(recipe.job.dump_folder)), problem_of)
    assert found.checkpoint is not None
    return found.checkpoint.step, found.refused


def verified(folder: Path) -> tuple[int, str]:
    """Status and output of `verify`."""
    printed = StringIO()
    with redirect_stdout(printed):
        return verify_main([str(folder)]), printed.getvalue()


def started_from(folder: Path, run: Path, corpus: str) -> tuple[int, str]:
    """Status and output of the preflight of a new run that starts from a checkpoint."""
    words = {"model.flavor": "custom", "model.dim": 16, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2,
             "model.vocab_size": 258, "data.tokenizer": "bytes", "training.dataset_path": corpus,
             "training.seq_len": 32, "training.global_batch_size": 8, "training.local_batch_size": 2,
             "training.steps": 6, "training.mixed_precision_param": "float32", "checkpoint.enable": "true",
             "checkpoint.initial_load_path": folder, "job.dump_folder": run}  # fmt: skip
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        status = preflight_main([word for key, value in words.items() for word in (f"--{key}", str(value))])
    return status, printed.getvalue()


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    bomb = Bomb(tmp_path / "exploded")
    pickle.loads(pickle.dumps(bomb))
    assert bomb.path.exists()


def test_the_honest_run_is_found_verified_and_started_from(
    honest: tuple[Path, Recipe], confined: Any, tmp_path: Path
) -> None:
    run, recipe = copied(honest, tmp_path)
    assert confined(found_by_resume, recipe) == (4, [])
    assert confined(verified, run / "checkpoint" / "step-4")[0] == 0
    status, printed = started_from(run / "checkpoint" / "step-4", tmp_path / "new", recipe.training.dataset_path or "")
    assert status == 0, printed


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_refused(
    name: str, honest: tuple[Path, Recipe], confined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = copied(honest, tmp_path)
    step = run / "checkpoint" / "step-4"
    bomb = Bomb(tmp_path / "exploded")
    CASES[name](step, bomb)
    signed(step)
    monkeypatch.chdir(tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    tries = confined(tried_everywhere, recipe, step, None if name in NOT_FOR_A_START else tmp_path / "new")
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "something was written, or the bomb went off"

    step_found, lines = tries["resume"]
    assert step_found == 2
    for way, (status, errors) in tries.items():
        if way != "resume":
            assert status != 0, way
            lines = errors
        assert len(lines) == 1, (way, lines)
        assert REFUSED.fullmatch(lines[0]), (way, lines[0])
        assert lines[0].isprintable(), (way, lines[0])


def tried_everywhere(recipe: Recipe, step: Path, new: Path | None) -> dict[str, tuple[int, list[str]]]:
    """Way of reading a checkpoint -> (result, lines about what was refused)."""
    tries = {"resume": found_by_resume(recipe)}
    status, printed = verified(step)
    tries["verify"] = status, [line.removeprefix("error: ") for line in printed.splitlines()]
    if new is not None:
        status, printed = started_from(step, new, recipe.training.dataset_path or "")
        assert "Traceback" not in printed
        errors = [line.split("error: ", 1)[1] for line in printed.splitlines() if "error: " in line]
        tries["initial_load_path"] = status, [line.removeprefix("checkpoint.initial_load_path: ") for line in errors]
    try:
        open_source(step)
    except TitanGrowthError as error:
        tries["grow"] = 1, [str(error)]
    else:
        tries["grow"] = 0, []
    printed_too = StringIO()
    with redirect_stdout(printed_too), redirect_stderr(printed_too):
        if status := lineage_main([str(step)]):
            tries["lineage"] = status, [line.removeprefix("error: ") for line in printed_too.getvalue().splitlines()]
    return tries


def test_a_run_resumes_from_the_older_step(honest: tuple[Path, Recipe], tmp_path: Path) -> None:
    """Not only found: training continues from it, with the hostile one set aside."""
    run, recipe = copied(honest, tmp_path)
    step = run / "checkpoint" / "step-4"
    bomb = Bomb(tmp_path / "exploded")
    CASES["a pickle as metadata"](step, bomb)
    signed(step)
    run_ranks(train, 1, 1, recipe)
    assert (run / "checkpoint" / "damaged-4").is_dir()
    assert open_step(run / "checkpoint" / "step-5") is not None
    assert not bomb.path.exists()


def test_none_usable_is_an_error(honest: tuple[Path, Recipe], tmp_path: Path) -> None:
    """A run whose checkpoints are all hostile does not start from scratch."""
    _, recipe = copied(honest, tmp_path)
    bomb = Bomb(tmp_path / "exploded")
    for step in (Path(recipe.job.dump_folder) / "checkpoint").glob("*-*"):
        CASES["a pickle as metadata"](step, bomb)
        signed(step)
    with pytest.raises(AssertionError, match=r"none can be used: step-4 refused: .*; step-2 refused: .*; step-1 "):
        run_ranks(train, 1, 1, recipe)
    assert not (Path(recipe.job.dump_folder) / "checkpoint" / "step-5").exists()
    assert not bomb.path.exists()


def test_a_finished_run_with_a_flipped_bit_is_not_finished(
    honest: tuple[Path, Recipe], confined: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`nothing to do` is printed only for an intact checkpoint."""
    from titan_growth.liveness.exit_report import NOTHING_TO_DO

    run, _ = copied(honest, tmp_path)
    (tmp_path / "run.toml").write_bytes((run / "checkpoint" / "step-4" / "recipe.toml").read_bytes())
    words = ["--job.config_file", str(tmp_path / "run.toml"), "--job.dump_folder", str(run)]
    assert preflight_main(words) == NOTHING_TO_DO
    assert "nothing to do" in capsys.readouterr().out
    shard = run / "checkpoint" / "step-4" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert preflight_main(words) == 0
    printed = capsys.readouterr().out
    assert "step-4 refused: __0_0.distcp does not match its checksum" in printed
    assert "nothing to do" not in printed


def rolled_back_to(root: Path, source: str) -> str:
    """The error of a roll-back to the source of a growth, as named in its lineage."""
    manager = CheckpointManager(CheckpointConfig(enable=True), root)
    try:
        manager.roll_back(RollBackError("the growth", lambda manifest: manifest, source))
    except TitanGrowthError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("source", ["../step-2", "/etc", "step-4/../../other", "damaged-4", "step-01"])
def test_a_growth_is_not_rolled_back_to_another_folder(source: str, confined: Any, tmp_path: Path) -> None:
    """A roll-back writes into the folder that the lineage names."""
    message = confined(rolled_back_to, tmp_path, source)
    assert message == f"the growth cannot be rolled back: {source} is not a checkpoint of this run"


# ---- fuzzing ---------------------------------------------------------------------------------------------------------


def mutated(data: bytes, generator: Any) -> bytes:
    """A few bytes flipped, replaced, cut out or doubled."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(changed))
        kind = generator.randrange(5)
        if kind == 0:
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[place : place + 4] = generator.randbytes(4)
        elif kind == 2:
            del changed[place : place + generator.randint(1, 40)]
        elif kind == 3:
            changed[place:place] = changed[place : place + generator.randint(1, 40)]
        else:
            changed[place : place + 8] = generator.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"99999999"])
        if not changed:
            break
    return bytes(changed)


def tried(step: Path, names: list[str], rounds: int, seed: int) -> dict[str, int]:
    """Mutates files of a checkpoint, one at a time, and verifies it each time; counts the outcomes."""
    import random

    generator = random.Random(seed)
    counts = {"good": 0, "refused": 0, "not committed": 0}
    whole = {path.name: path.read_bytes() for path in step.iterdir()}
    for _ in range(rounds):
        name = generator.choice(names)
        (step / name).write_bytes(mutated(whole[name], generator))
        if name != "manifest.json":
            signed(step)
        status, printed = verified(step)
        if status == 0:
            counts["good"] += 1
        elif "was never committed" in printed:
            counts["not committed"] += 1
        else:
            (line,) = printed.splitlines()
            assert REFUSED.fullmatch(line.removeprefix("error: ")), (name, line)
            assert line.isprintable(), (name, line)
            counts["refused"] += 1
        (step / name).write_bytes(whole[name])
        (step / "manifest.json").write_bytes(whole["manifest.json"])
    return counts


FILES = [".metadata", "__0_0.distcp", "manifest.json", "lineage.json", "recipe.toml"]


def test_fuzzing_finds_nothing_in_a_few_rounds(honest: tuple[Path, Recipe], confined: Any, tmp_path: Path) -> None:
    run, _ = copied(honest, tmp_path)
    counts = confined(tried, run / "checkpoint" / "step-4", FILES, 25, 0)
    assert counts["refused"] > 8, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_fuzzing_finds_nothing(name: str, honest: tuple[Path, Recipe], confined: Any, tmp_path: Path) -> None:
    """Hundreds of mutations of each file, with a fixed seed: refused in one line, or readable."""
    run, _ = copied(honest, tmp_path)
    counts = confined(tried, run / "checkpoint" / "step-4", [name], 400, 1, max_seconds=300)
    assert counts["refused"] > 20, counts


def test_plugins_that_a_checkpoint_names_are_not_imported(
    honest: tuple[Path, Recipe], confined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a resume nor by a command. To trust them, name them in the recipe."""
    run, recipe = copied(honest, tmp_path)
    step = run / "checkpoint" / "step-4"
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('exploded').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    stored = (step / "recipe.toml").read_text()
    (step / "recipe.toml").write_text('plugins = ["evil"]\n' + stored.replace("plugins = []\n", ""))
    signed(step)
    assert confined(found_by_resume, recipe) == (4, [])
    assert confined(verified, step)[0] == 0
    with pytest.raises(TitanGrowthError, match=r"plugins: .* was written with the plugin evil, .*add --plugins evil"):
        open_source(step)
    run_ranks(train, 1, 1, recipe)
    assert not (tmp_path / "exploded").exists()
    importlib.import_module("evil")
    assert (tmp_path / "exploded").exists(), "the bomb of this test does not go off at all"


def test_the_manifest_of_another_step_is_refused(honest: tuple[Path, Recipe], confined: Any, tmp_path: Path) -> None:
    run, recipe = copied(honest, tmp_path)
    (run / "checkpoint" / "step-4").rename(run / "checkpoint" / "step-900719925474099")
    (run / "checkpoint" / "step-007").mkdir()
    (run / "checkpoint" / "step-1e3").mkdir()
    (run / "checkpoint" / ("step-" + "9" * 60)).mkdir()
    step, lines = confined(found_by_resume, recipe)
    gone = "step-4 refused: its folder is gone, though the ledger lists it"
    assert (step, lines) == (2, ["step-900719925474099 refused: its manifest is for step 4", gone])


def test_a_wrong_checksum_comes_before_what_it_would_lead_to(
    honest: tuple[Path, Recipe], confined: Any, tmp_path: Path
) -> None:
    run, recipe = copied(honest, tmp_path)
    step = open_step(run / "checkpoint" / "step-4")
    assert step is not None
    entry = step.manifest.files[".metadata"]
    files = {**step.manifest.files, ".metadata": {**entry, "sha256": "0" * 64}}
    manifest = replace(step.manifest, files=files)
    (step.path / "manifest.json").write_text(json.dumps(json.loads(manifest.to_json()), indent=1) + "\n")
    assert confined(found_by_resume, recipe)[1] == ["step-4 refused: .metadata does not match its checksum"]
