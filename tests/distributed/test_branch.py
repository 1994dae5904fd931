"""Cool-downs branched from a run's stable phase: what they take over, where they start, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import WarmRanks
from tests.runs import make_recipe, read_steps, train
from titan_growth.__main__ import main
from titan_growth.checkpoint.folder import open_step, write_manifest
from titan_growth.commands.lineage import lineage_lines
from titan_growth.config.loader import load_recipe

PEAK = 1e-2
PARENT = {
    "training__steps": 12,
    "lr_scheduler__warmup_steps": 4,
    "lr_scheduler__decay_ratio": 0.25,
    "growth__stages__0__at": "4 steps",
    "growth__stages__0__factor": 2,
    "growth__stages__0__warmup_steps": 2,
    "growth__stages__0__optimizer_state": "copy",
    "growth__stages__1__at": "11 steps",
    "growth__stages__1__factor": 2,
    "growth__stages__1__lr_policy": "continue",
    "model__n_layers": 8,
    "checkpoint__enable": True,
    "checkpoint__interval": 3,
    "checkpoint__keep_latest_k": 0,
    "debug__log_batch_hash": True,
}
"""Warmup to step 4, growth, warmup to step 6, stable to step 9, decay to step 12; another growth in it, at step 11."""


@pytest.fixture(scope="module")
def parent(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("branch") / "parent"
    warm_ranks(train, 2, 2, make_recipe(folder, **PARENT))
    (folder / "recipe.toml").touch()
    return folder


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def branch(source: Path, steps: int, target: Path) -> int:
    return main(["branch", "--from", str(source), "--steps", str(steps), "--to", str(target)])


def cooled(warm_ranks: WarmRanks, target: Path, num_ranks: int = 2) -> list[dict[str, Any]]:
    """The steps of a branch that has been trained."""
    recipe = load_recipe(["--job.config_file", str(target / "branch.toml"), "--training.local_batch_size", "2"])
    warm_ranks(train, num_ranks, num_ranks, recipe)
    return read_steps(target)


def test_a_branch_at_the_decay_is_the_runs_own_end(
    warm_ranks: WarmRanks, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest stable step is 9, where the parent's decay of 3 steps begins: until it grows again, the same bits."""
    before = files_of(parent)
    assert branch(parent, 3, tmp_path / "run") == 0
    assert f"3 steps from step 9 (2,304 tokens) of {parent}/checkpoint/step-9" in capsys.readouterr().out
    lines = cooled(warm_ranks, tmp_path / "run")
    assert [line["step"] for line in lines] == [10, 11, 12]
    assert [line["lr"] for line in lines] == pytest.approx([PEAK, PEAK * 2 / 3, PEAK / 3])
    own = read_steps(parent)[9:]
    for key in ("loss", "grad_norm", "batch_hash", "tokens", "flops"):
        assert [line[key] for line in lines[:2]] == [line[key] for line in own[:2]], key
    assert lines[2]["batch_hash"] == own[2]["batch_hash"]
    assert [line["num_layers"] for line in lines] == [4, 4, 4], "a growth of the parent that was still to come"
    assert files_of(parent) == before
    last = tmp_path / "run" / "checkpoint" / "step-12"
    lineage = json.loads((last / "lineage.json").read_text())
    assert lineage["parents"] == [str(parent / "checkpoint" / "step-9")]
    assert [event["step"] for event in lineage["events"]] == [4]
    assert f"goes on from {parent}/checkpoint/step-9" in list(lineage_lines(last))


@pytest.mark.slow
@pytest.mark.parametrize(("step", "num_layers"), [(4, 2), (6, 4), (9, 4)])
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_branches_on_other_ranks(
    warm_ranks: WarmRanks, parent: Path, tmp_path: Path, step: int, num_layers: int, num_ranks: int
) -> None:
    assert branch(parent / "checkpoint" / f"step-{step}", 5, tmp_path / "run") == 0
    lines = cooled(warm_ranks, tmp_path / "run", num_ranks)
    assert [line["step"] for line in lines] == list(range(step + 1, step + 6))
    assert [line["lr"] for line in lines] == pytest.approx([PEAK * share / 5 for share in (5, 4, 3, 2, 1)])
    assert {line["num_layers"] for line in lines} == {num_layers}
    hashes = {line["step"]: line["batch_hash"] for line in read_steps(parent)}
    assert all(hashes.get(line["step"], line["batch_hash"]) == line["batch_hash"] for line in lines)
    if num_layers == 4:
        first = read_steps(parent)[step]
        assert lines[0]["loss"] == pytest.approx(first["loss"], abs=2e-5)


def refusal(capsys: pytest.CaptureFixture[str], source: Path, target: Path, status: int) -> str:
    assert branch(source, 5, target) == status
    assert not target.exists() or not any(target.rglob("*.toml"))
    return capsys.readouterr().out


def test_what_cannot_be_branched(
    warm_ranks: WarmRanks, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run"
    for step, expected in (
        (3, "still warming up. Take a later step"),
        (12, "already decaying. Take step 9 or an earlier one"),
    ):
        assert expected in refusal(capsys, parent / "checkpoint" / f"step-{step}", target, 1)
    inside = refusal(capsys, parent / "checkpoint" / "step-9", parent / "checkpoint" / "cool-down", 2)
    assert "is inside the source" in inside
    assert "no such folder" in refusal(capsys, tmp_path / "none", target, 2)
    assert "neither a committed step folder nor a run's folder" in refusal(capsys, tmp_path, target, 1)
    weights = tmp_path / "step-9"
    shutil.copytree(parent / "checkpoint" / "step-9", weights)
    folder = open_step(weights)
    assert folder is not None
    write_manifest(weights, replace(folder.manifest, model_only=True))
    assert "holds only weights" in refusal(capsys, weights, target, 1)


def test_a_schedule_without_a_stable_phase(
    warm_ranks: WarmRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path / "run", training__steps=3, checkpoint__enable=True, checkpoint__interval=2)
    warm_ranks(train, 2, 2, recipe)
    assert "no stable phase" in refusal(capsys, tmp_path / "run", tmp_path / "cool-down", 1)
