"""Bases without layers: embedding, norm and head train, and all layers come in one growth, on every mesh the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.meshes import GLOBAL_BATCH, MESHES, QWEN3, TIED, mesh
from tests.distributed.test_parity import Trained
from tests.runs import make_recipe
from titan_growth.run.plan import plan_run
from titan_growth.tools.findings import Findings

NEW = '[{at = "3 steps", operator = "map", layer_map = [-1, -1, -1], optimizer_state = "asymmetric"}]'
MASKED = '[{at = "3 steps", operator = "random_depth", n_layers = 3, mask_steps = 2, optimizer_state = "copy"}]'
BASE: dict[str, Any] = {
    "model__n_layers": 3,
    "growth__base__n_layers": 0,
    "growth__stages": NEW,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "lr_scheduler__warmup_steps": 0,
}
ALONE = {"training__local_batch_size": GLOBAL_BATCH}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("fsdp2", {}),
    "tp2, masked": ("tp2", {"growth__stages": MASKED}),
    "pp2": ("pp2", {}),
    "pp2, masked": ("pp2", {"growth__stages": MASKED}),
    "cp2": ("cp2", {}),
    "hsdp 2x2": ("hsdp 2x2", {}),
    "fsdp2 x tp2, Muon": ("fsdp2 x tp2", {"optimizer__name": "Muon", "optimizer__lr": 5e-3}),
    "pp2 x fsdp2 x tp2": ("pp2 x fsdp2 x tp2", {}),
    "tp2, chunked loss, tied": ("tp2", {**TIED, "training__loss_chunk_tokens": 20}),
    "tp2, recomputed": ("tp2", {"activation_checkpoint__mode": "full"}),
    "qwen3: fsdp2 x tp2": ("fsdp2 x tp2", QWEN3),
}


@pytest.mark.parametrize(
    "name", [name if name in ("fsdp2", "tp2, masked") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_meshes_agree_with_one_rank(name: str, trained: Trained) -> None:
    """Losses to 1e-5 before and after the growth; what the base has learned is kept."""
    where, settings = CASES[name]
    expected = [line for line in trained(1, **BASE | settings, **ALONE) if "grad_norm" in line]
    case = MESHES[where]
    found = [line for line in trained(case.num_ranks, **BASE | settings, **case.layout) if "grad_norm" in line]
    assert [line["num_layers"] for line in found] == [0, 0, 0, 3, 3, 3]
    for line, reference in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert found[3]["loss"] < found[2]["loss"] < found[0]["loss"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"factor": 3}, "copies layers, and the model has none by then. Use random_depth with n_layers, or map"),
        ({"operator": "zero_depth", "n_layers": 3}, "copies layers, and the model has none by then"),
        ({"operator": "learn", "n_layers": 3}, "combines layers, and the model has none by then"),
        ({"operator": "random_depth", "factor": 3, "mask_steps": 2}, "factor = 3 of 0 layers are 0. Give n_layers"),
        ({"operator": "stack", "layer_map": [-1, -1, -1]}, "copies layers, and the model has none by then"),
    ],
    ids=str,
)
def test_what_needs_layers_is_refused(stage: dict[str, Any], message: str, tmp_path: Any) -> None:
    growth = {f"growth__stages__0__{key}": value for key, value in {"at": "3 steps", **stage}.items()}
    settings = {key: value for key, value in BASE.items() if key != "growth__stages"}
    recipe = make_recipe(tmp_path / "run", **settings, **growth, **ALONE)
    assert plan_run(recipe, found := Findings(), num_ranks=1, device_type="cpu") is None
    assert [problem.key for problem in found.problems] == ["growth.stages.0"]
    assert found.problems[0].message.startswith(message)


def test_more_parts_than_a_base_has_are_refused(tmp_path: Any) -> None:
    """Embedding and head are two parts; a third would be empty."""
    for pp, good in ((2, True), (3, False)):
        recipe = make_recipe(tmp_path / f"{pp}", **BASE, **mesh(pp=pp).layout)
        plan = plan_run(recipe, found := Findings(), num_ranks=pp, device_type="cpu")
        assert (plan is not None) == good, found.problems
        if not good:
            assert "parallelism.pipeline_parallel_degree" in found.problems[0].key
