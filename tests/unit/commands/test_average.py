"""The mean of checkpoints on disk: numpy's, of one model only, and a checkpoint like any other."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, train, trainer_of
from titan_growth.__main__ import main
from titan_growth.checkpoint.folder import open_step
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.commands.source import open_source, whole_tensor
from titan_growth.config.loader import to_toml

SETTINGS: dict[str, Any] = {
    "model__n_layers": 2,
    "training__steps": 6,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
}


def trained(warm_ranks: WarmRanks, folder: Path, num_ranks: int, **settings: Any) -> Path:
    """The folder of a run, with its recipe as the real entry leaves it."""
    recipe = make_recipe(folder, **SETTINGS | settings)
    warm_ranks(train, num_ranks, num_ranks, recipe)
    (folder / "recipe.toml").write_text(to_toml(recipe))
    return folder


@pytest.fixture(scope="module")
def run(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, with step-2, step-4 and step-6."""
    return trained(warm_ranks, tmp_path_factory.mktemp("average") / "run", 2)


def average(source: Path, last: object, target: Path | str) -> int:
    return main(["average", "--from", str(source), "--last", str(last), "--to", str(target)])


def stored(folder: Path) -> dict[str, Tensor]:
    """The weights of a step folder, whole."""
    reader = SafeReader(folder)
    chunks, entries = reader.chunks(), reader.tensor_entries()
    return {
        name: whole_tensor(reader, chunks[name], tuple(entries[name].size))
        for name in chunks
        if not name.startswith(("optimizer.", "rng."))
    }


@pytest.mark.parametrize("last", [2, 3])
def test_it_is_numpys_mean(last: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In float64, rounded once; of chunks that two ranks have written."""
    assert average(run, last, tmp_path / "mean") == 0
    steps = [2, 4, 6][-last:]
    assert f"the mean of steps {', '.join(map(str, steps))}: " in capsys.readouterr().out
    checkpoints = [stored(run / f"checkpoint/step-{step}") for step in steps]
    mean = stored(tmp_path / "mean")
    assert mean.keys() == checkpoints[0].keys()
    for name, tensor in mean.items():
        expected = np.mean([one[name].numpy().astype(np.float64) for one in checkpoints], axis=0)
        assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name


def test_of_bfloat16_weights(warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """Half of a sum is rounded to the nearest value, not added up in bfloat16. A folder of step folders will do."""
    types = {"training__dtype": "bfloat16", "training__mixed_precision_param": "bfloat16"}
    run = trained(warm_ranks, tmp_path / "run", 1, **types)
    assert average(run / "checkpoint", 3, tmp_path / "mean") == 0
    checkpoints = [stored(run / f"checkpoint/step-{step}") for step in (2, 4, 6)]
    for name, tensor in stored(tmp_path / "mean").items():
        expected = np.mean([one[name].double().numpy() for one in checkpoints], axis=0)
        assert torch.equal(tensor, torch.from_numpy(expected).bfloat16()), name


def test_it_is_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """verify, export and lineage take it, and it names its steps."""
    target = tmp_path / "mean"
    assert average(run, 2, target) == 0
    folder = open_step(target)
    assert folder is not None
    assert folder.manifest.model_only
    assert folder.step == 6
    names = tuple(str(run / f"checkpoint/step-{step}") for step in (4, 6))
    assert open_source(target).lineage.averaged == names
    assert main(["verify", str(target)]) == 0
    assert "21 tensors of the model and no optimizer state" in capsys.readouterr().out
    assert main(["lineage", str(target)]) == 0
    out = capsys.readouterr().out
    assert " FLOPs, averaged on disk\n" in out
    assert f"weights: the mean of {names[0]}, {names[1]}" in out
    assert main(["export", "--from", str(target), "--to", str(tmp_path / "exported")]) == 0
    grown = ["grow", "--from", str(target), "--operator", "stack", "--factor", "2", "--to", str(tmp_path / "grown")]
    assert main(grown) == 0
    capsys.readouterr()
    assert main(["lineage", str(tmp_path / "grown")]) == 0
    out = capsys.readouterr().out
    assert "\n    grown on disk, " in out
    assert " FLOPs, grown on disk\n" in out


def started(rank: int, num_ranks: int, recipe: Any) -> dict[str, Tensor]:
    """The whole weights that a run starts with, before it takes its steps."""
    with trainer_of(recipe, num_ranks) as trainer:
        tensors = trainer.runtime.tensors(optimizer=False).items()
        found = {name: (one.full_tensor() if num_ranks > 1 else one).clone() for name, one in tensors}
        assert trainer.fit()
    return found


def test_a_run_starts_from_it(run: Path, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """One step at a rate of nearly zero, and a validation: the loss of the mean, which no checkpoint had."""
    assert average(run, 3, tmp_path / "mean") == 0
    start = {"checkpoint__initial_load_path": str(tmp_path / "mean"), "training__steps": 1, "optimizer__lr": 1e-12}
    recipe = make_recipe(tmp_path / "next", **SETTINGS | start, validation__enable=True)
    found = warm_ranks(started, 2, 2, recipe)[0]
    mean = stored(tmp_path / "mean")
    assert found.keys() == mean.keys()
    assert all(torch.equal(tensor, mean[name]) for name, tensor in found.items())
    (line,) = [line for line in read_metrics(tmp_path / "next") if "validation_loss" in line]
    assert 0 < line["validation_loss"] < 6


def test_not_across_a_growth(warm_ranks: WarmRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = '[{at = "2 steps", operator = "stack", factor = 2}]'
    run = trained(warm_ranks, tmp_path / "run", 1, model__n_layers=4, growth__stages=stages)
    assert average(run, 3, tmp_path / "mean") == 1
    assert capsys.readouterr().out == (
        "error: step-2 refused: it has no mean with step-6: the model grew in between (n_layers 2 -> 4). Those of one "
        "model are the last 2\n"
    )
    assert not list((tmp_path / "mean").glob("*"))
    assert average(run, 2, tmp_path / "mean") == 0
    assert len(open_source(tmp_path / "mean").lineage.events) == 1


def test_not_across_another_rotary_base(
    warm_ranks: WarmRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes alone are not the model."""
    stages = '[{at = "4 steps", operator = "identity", rope_theta = 20000.0}]'
    base = {"model__rope_theta": 20000.0, "growth__base__rope_theta": 10000.0}
    run = trained(warm_ranks, tmp_path / "run", 1, growth__stages=stages, **base)
    assert average(run, 2, tmp_path / "mean") == 1
    assert "the model grew in between (rope_theta 10000.0 -> 20000.0)" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_left_out_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoint/step-4/__0_0.distcp").write_bytes(b"")
    assert average(tmp_path / "run", 2, tmp_path / "mean") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("left out: step-4 refused: __0_0.distcp has 0 bytes instead of ")
    assert "the mean of steps 2, 6: " in lines[1]


def test_bits_that_flipped_are_noticed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/checkpoint/step-4/__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert average(tmp_path / "run", 2, tmp_path / "mean") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left out: step-4 refused: __0_0.distcp does not match its checksum"
    assert "the mean of steps 2, 6: " in lines[1]
    assert average(tmp_path / "run", 3, tmp_path / "more") == 1
    assert "has 2 checkpoints that can be read, fewer than 3" in capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 9])
def test_a_run_that_removes_a_checkpoint_meanwhile(
    number: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its first tensor, or later: the message names that checkpoint, and nothing is committed."""
    shutil.copytree(run, tmp_path / "run")
    calls = itertools.count(1)

    def removed(*args: Any) -> Tensor:
        if next(calls) == number:
            shutil.rmtree(tmp_path / "run/checkpoint/step-4")
        return whole_tensor(*args)

    monkeypatch.setattr("titan_growth.commands.average.whole_tensor", removed)
    assert average(tmp_path / "run", 2, tmp_path / "mean") == 1
    assert capsys.readouterr().out == (
        "error: step-4 refused: it was removed while the mean was made. The run keeps the newest "
        "checkpoint.keep_latest_k: average fewer, or raise it\n"
    )
    assert not list((tmp_path / "mean").iterdir())


def test_a_run_that_removes_a_checkpoint_before_it_is_opened(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "run")

    def removed(target: Path, source: Path) -> None:
        shutil.rmtree(tmp_path / "run/checkpoint/step-4", ignore_errors=True)

    monkeypatch.setattr("titan_growth.commands.average.require_new", removed)
    assert average(tmp_path / "run", 2, tmp_path / "mean") == 0
    assert "left out: step-4 refused: it was removed while the mean was made." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "last", "target", "message"),
    [
        ("run", 1, "mean", "--last: expected a whole number of at least 2, got '1'"),
        ("run", "all", "mean", "--last: expected a whole number of at least 2, got 'all'"),
        (
            "run",
            4,
            "mean",
            "--last: RUN has 3 usable checkpoints, fewer than 4. A run keeps the newest checkpoint.keep_latest_k",
        ),
        ("nowhere", 2, "mean", "nowhere: no such folder. Name a run's dump folder"),
        ("run/checkpoint/step-2", 2, "mean", "step-2 is one checkpoint. Name the run's dump folder"),
        ("run", 2, "run", "--to: RUN is inside the source"),
        ("run", 2, "s3://bucket/mean", "--to: must be a path on this machine, got 's3://bucket/mean'"),
        ("run", 2, "full", "is not empty. Name a folder that does not exist"),
    ],
)
def test_wrong_arguments(
    source: str,
    last: object,
    target: str,
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    to = run if target == "run" else target if "://" in target else tmp_path / target
    assert average(run.parent / source, last, to) == 2
    error = capsys.readouterr().out
    assert message.replace("RUN", str(run)) in error
    assert error.count("error: ") == 1
