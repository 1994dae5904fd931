"""Runs under CompleteP: every mesh computes what one rank does, and growths keep the function while factors change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import MESHES, ONE_RANK
from tests.distributed.test_growth_across_meshes import (
    COMPLETEP,
    UNDER_COMPLETEP,
    Matrix,
    assert_same,
    every_fourth,
)
from tests.distributed.test_parity import Trained, assert_agrees_with_one_rank
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, train
from titan_growth.checkpoint.folder import open_step
from titan_growth.commands.grow import main as grow_main
from titan_growth.commands.source import open_source
from titan_growth.run.resume import as_decided, compare

SETTINGS = {**COMPLETEP, "training__steps": 3, "model__n_layers": 3}
SOME = ("fsdp2", "tp2, tied head", "pp2, tied head", "tp2, chunked loss")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_meshes_agree_with_one_rank(name: str, trained: Trained) -> None:
    """The factors are numbers of the model's math, of which no stage knows."""
    settings = {key: value for key, value in SETTINGS.items() if key not in MESHES[name].model}
    assert_agrees_with_one_rank(MESHES[name], trained, **settings)


def test_it_is_another_model(trained: Trained) -> None:
    """The head starts as at the base and its factor is 1 / 2: the first logits are smaller, the loss is nearer ln V."""
    scaled = trained(1, **SETTINGS, **ONE_RANK.layout)
    standard = trained(1, training__steps=3, model__n_layers=3, **ONE_RANK.layout)
    assert scaled[0]["loss"] < standard[0]["loss"] - 1e-3


def test_compiled_blocks_compute_the_same(trained: Trained, warm_imports: None) -> None:
    """The factors are constants of the compiled graphs."""
    compiled = {"compile__enable": True, "compile__backend": "aot_eager"}
    expected = trained(1, **SETTINGS, **ONE_RANK.layout)
    found = trained(1, **SETTINGS, **compiled, **ONE_RANK.layout)
    for line, reference in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-5)


# ---- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "operator"),
    [
        ("tp2", "fsdp2", "zero_depth scaled, CompleteP"),
        *every_fourth(UNDER_COMPLETEP),
    ],
)
def test_growths_are_those_of_one_rank(source: str, target: str, operator: str, matrix: Matrix) -> None:
    """Weights and both moments bit for bit, three more steps to 1e-5."""
    assert_same(matrix, source, target, operator)


@pytest.mark.parametrize("operator", ["zero_depth", "split_width", "zero_width"])
def test_a_growth_keeps_the_loss_and_goes_on_at_the_sizes_of_the_moment(
    operator: str, tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """The run itself compares the losses before and after to 1e-5, and would end."""
    stage: dict[str, Any] = {"at": "2 steps", "operator": operator, "factor": 2, "lr_policy": "continue"}
    sizes = {"n_layers": 4} if operator == "zero_depth" else {
        "dim": 64, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 96, "head_dim": 8}  # fmt: skip
    settings = {
        **COMPLETEP,
        **{f"model__{key}": size for key, size in sizes.items()},
        **{f"growth__stages__0__{key}": value for key, value in stage.items()},
    }
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", training__steps=4, checkpoint__enable=True, **settings))
    lines = read_metrics(tmp_path / "run")
    (growth,) = [line for line in lines if line.get("event") == "growth"]
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], rel=1e-5)
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4]


def test_another_base_is_another_run(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """The base is fixed for a run, as its model is; and a grown checkpoint on disk keeps it."""
    saving = {"training__steps": 1, "checkpoint__enable": True}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **saving, **COMPLETEP))
    step = tmp_path / "run" / "checkpoint" / "step-1"
    checkpoint = open_step(step)
    assert checkpoint is not None
    other = make_recipe(tmp_path / "run", **saving, **COMPLETEP | {"model__mup__base_hidden_dim": 50})
    problems, _ = compare(checkpoint, as_decided(checkpoint, other))
    assert [problem.key for problem in problems] == ["model (mup.hidden_dim)"]
    hidden = ["--operator", "zero_width", "--hidden-dim", "320", "--n-heads", "8"]
    assert grow_main(["--from", str(step), "--to", str(tmp_path / "grown"), *hidden]) == 0
    before, after = (open_source(path).config for path in (step, tmp_path / "grown"))
    assert (after.hidden_dim, after.num_heads, after.num_kv_heads) == (320, 8, 2)
    assert after.mup == before.mup
