"""Every mesh computes what one rank computes, from the same weights and the same global batches.

Loss and gradient norm of the first step to 1e-5 relative in fp32, ten steps and the validation loss to 1e-4.
`tests/faults/parity.py` records the differences; most are near 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.meshes import GLOBAL_BATCH, MESHES, ONE_RANK, QUICK, Case
from tests.runs import assert_parity

Trained = Callable[..., list[dict[str, Any]]]


def assert_agrees_with_one_rank(case: Case, trained: Trained, **settings: Any) -> list[dict[str, Any]]:
    """Trains the case and its model on one rank; the lines of the case."""
    settings |= case.model
    expected = trained(1, **settings, **ONE_RANK.layout)
    found = trained(case.num_ranks, **settings, **case.layout)
    assert_parity(found, expected)
    return found


@pytest.mark.parametrize("name", QUICK)
def test_three_steps_agree_with_one_rank(name: str, trained: Trained) -> None:
    """One mesh of each kind, with three layers by default, and one batch of held-out sequences."""
    validation = {"validation__enable": True, "validation__freq": 3, "validation__steps": 1}
    assert_agrees_with_one_rank(MESHES[name], trained, training__steps=3, model__n_layers=3, **validation)


@pytest.mark.slow(thin=False)  # the one table that has every mesh
@pytest.mark.parametrize("name", MESHES)
def test_ten_steps_agree_with_one_rank(name: str, trained: Trained) -> None:
    """All meshes, and all held-out sequences at steps 5 and 10."""
    validation = {"validation__enable": True, "validation__freq": 5, "validation__steps": -1}
    lines = assert_agrees_with_one_rank(MESHES[name], trained, training__steps=10, **validation)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert lines[-2]["loss"] < lines[0]["loss"] - 0.4, "the run does not learn"


GROUPED = {
    "training__steps": 3,
    "model__n_layers": 3,
    "optimizer__weight_decay_on": "matrices",
    "optimizer__groups": '[{pattern = "*wq.weight", lr_factor = 0.5}, {pattern = "layers.0.*", frozen = true}]',
}


@pytest.mark.parametrize(
    "name", ["tp2", "pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2 x tp2", "pp2 x cp2"))]
)
def test_parameter_groups_agree_with_one_rank(name: str, trained: Trained) -> None:
    """With a frozen layer, which is all that one rank of the pipeline has besides the embedding."""
    lines = assert_agrees_with_one_rank(MESHES[name], trained, **GROUPED)
    plain = trained(1, training__steps=3, model__n_layers=3, **ONE_RANK.layout)
    assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert lines[0]["grad_norm"] < plain[0]["grad_norm"] * 0.999, "the frozen layer counts"
    assert lines[2]["loss"] != pytest.approx(plain[2]["loss"], rel=1e-4), "groups change nothing"


@pytest.mark.parametrize("name", ["1 rank", "fsdp2", "pp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_gradient_accumulation_changes_nothing(name: str, trained: Trained) -> None:
    """Four accumulation steps against one on the same mesh: 1e-5 relative at all steps."""
    case = {"1 rank": ONE_RANK, **MESHES}[name]
    whole = {"training__steps": 3, "model__n_layers": 2, "training__global_batch_size": 4 * GLOBAL_BATCH, **case.layout}
    whole["training__local_batch_size"] *= 4
    if "parallelism__pipeline_parallel_microbatch_size" in whole:
        whole["parallelism__pipeline_parallel_microbatch_size"] *= 4
    parts = whole | case.layout
    assert parts["training__local_batch_size"] * 4 == whole["training__local_batch_size"]
    assert_parity(trained(case.num_ranks, **parts), trained(case.num_ranks, **whole), later=1e-5)
