"""Growths that change the run too: ranks, batch, sequence length; slopes; several growths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.runs import BASE, argv_of, make_recipe, read_steps, train, write_corpus
from titan_growth.commands.lineage import lineage_lines
from titan_growth.growth.schedule import slope
from titan_growth.metrics.records import MEASURED

ROOT = Path(__file__).parents[2]
SAVING = {"checkpoint__enable": True, "checkpoint__interval": 2}


def stages(*tables: dict[str, Any]) -> dict[str, Any]:
    """Growth stages as settings of `make_recipe`."""
    return {
        f"growth__stages__{number}__{key}": value for number, table in enumerate(tables) for key, value in table.items()
    }


def lineage(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "checkpoint" / f"step-{step}" / "lineage.json").read_text())


@pytest.mark.slow
def test_the_cluster_grows_with_the_model(tmp_path: Path) -> None:
    """One call of run_train.sh: 2 ranks, status 76 inside, then 4 ranks; no batch is lost or repeated."""
    write_corpus(tmp_path / "corpus.txt")
    values = {
        **BASE,
        "job.dump_folder": str(tmp_path / "run"),
        "training.dataset_path": str(tmp_path / "corpus.txt"),
        "checkpoint.enable": True,
        "metrics.enable_tensorboard": False,
        "debug.log_batch_hash": True,
        "growth.stages.0.at": "3 steps",
        "growth.stages.0.factor": 2,
        "growth.stages.0.num_ranks": 4,
        "growth.stages.0.parallelism.tensor_parallel_degree": 2,
    }
    command = [str(ROOT / "run_train.sh"), *argv_of(values)]
    environment = {**os.environ, "NGPU": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "saved at step 3; the growth wants 4 ranks" in output
    assert "Continuing with 4 ranks" in output
    (event,) = lineage(tmp_path / "run", 6)["events"]
    assert (event["mesh"], event["num_ranks"]) == ("dp_shard 2 x tp 2", 4)
    alone = make_recipe(tmp_path / "alone", debug__log_batch_hash=True, training__steps=6)
    run_ranks(train, 1, 1, alone)
    assert [line["batch_hash"] for line in read_steps(tmp_path / "run")] == [
        line["batch_hash"] for line in read_steps(tmp_path / "alone")
    ]
    assert [line["num_layers"] for line in read_steps(tmp_path / "run")] == [2, 2, 2, 4, 4, 4]


def test_batch_and_sequence_length_change_and_nothing_is_read_twice(tmp_path: Path) -> None:
    """8 x 32 tokens per step, then 4 x 64: the same text per step, from where the cursor was."""
    changes = {"at": "3 steps", "factor": 2, "global_batch_size": 4, "local_batch_size": 2, "seq_len": 64}
    recipe = make_recipe(tmp_path / "run", **stages(changes), **SAVING, data__shuffle=False, debug__log_batch_hash=True)
    run_ranks(train, 2, 2, recipe)
    manifests = [
        json.loads((tmp_path / "run" / "checkpoint" / f"step-{n}" / "manifest.json").read_text()) for n in (3, 6)
    ]
    assert [manifest["samples"] for manifest in manifests] == [24, 48], "the cursor counts blocks of 32 tokens"
    assert [line["tokens"] for line in read_steps(tmp_path / "run")] == [256 * n for n in range(1, 7)]
    per_token = [line["flops"] / line["tokens"] for line in read_steps(tmp_path / "run")[:2]]
    assert per_token[0] == per_token[1]
    bad = stages({**changes, "seq_len": 48})
    with pytest.raises(AssertionError, match="not a multiple of the run's base length 32"):
        run_ranks(train, 1, 1, make_recipe(tmp_path / "bad", **bad, **SAVING))


def test_a_slope_brings_the_growth_and_a_resume_does_not_move_it(tmp_path: Path) -> None:
    settings = {**stages({"at": "slope 0.35 over 4 steps", "factor": 2}), **SAVING, "training__steps": 24}
    run_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings))
    (event,) = lineage(tmp_path / "run", 24)["events"]
    losses = [line["loss"] for line in read_steps(tmp_path / "run")]
    reached = next(step for step in range(4, 24) if slope(losses[step - 4 : step]) < 0.35)
    assert event["step"] == reached > 4
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoint").glob("*-*"):
        if int(path.name.removeprefix("step-")) > reached - 1:
            shutil.rmtree(path)
    run_ranks(train, 2, 2, make_recipe(tmp_path / "again", **settings, training__local_batch_size=4))
    (again,) = lineage(tmp_path / "again", 24)["events"]
    assert again["step"] == reached, "the losses before the checkpoint count as well"


THREE = stages(
    {"at": "2 steps", "factor": 2, "operator": "interpose", "lr_policy": "continue", "optimizer_state": "copy"},
    {
        "at": "5 steps",
        "factor": 2,
        "lr_policy": "rewarm_new",
        "warmup_steps": 2,
        "optimizer_state": "asymmetric",
        "parallelism__tensor_parallel_degree": 2,
    },
    {"at": "7 steps", "operator": "zero_width", "factor": 2, "optimizer_state": "asymmetric", "local_batch_size": 4},
)
WIDE = {"model__dim": 64, "model__n_heads": 8, "model__n_kv_heads": 4, "model__head_dim": 8, "model__hidden_dim": 128}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[2, 4, 5, 6, 7, 8]])
def test_three_stages_resume_from_any_checkpoint(steps: list[int], tmp_path: Path) -> None:
    """x2, x2 on another mesh, then wider: from every checkpoint, the unbroken run's metrics, bitwise."""
    settings = {**THREE, **WIDE, **SAVING, "training__steps": 10, "model__n_layers": 4}
    run_ranks(train, 2, 2, make_recipe(tmp_path / "run", **settings))
    whole = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [line["num_layers"] for line in read_steps(tmp_path / "run")] == [1, 1, 2, 2, 2, 4, 4, 4, 4, 4]
    events = lineage(tmp_path / "run", 10)["events"]
    assert [event["mesh"] for event in events] == ["dp_shard 2", "tp 2", "tp 2"]
    text = "\n".join(lineage_lines(tmp_path / "run" / "checkpoint" / "step-10"))
    for expected in (
        "step 2: interpose, n_layers 1 -> 2",
        "on tp 2 (2 ranks)",
        "zero_width, dim 32 -> 64",
        "step 10: 4 layers",
    ):
        assert expected in text
    for step in steps:
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "run", folder)
        for path in (folder / "checkpoint").glob("*-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        run_ranks(train, 2, 2, make_recipe(folder, **settings))
        found = (folder / "metrics.jsonl").read_text().splitlines()
        assert [_without_timings(line) for line in found] == [_without_timings(line) for line in whole], step


def _without_timings(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key not in MEASURED}
