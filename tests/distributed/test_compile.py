"""Compiled blocks and loss compute what eager ones compute, on every kind of mesh and with any memory budget.

`aot_eager` traces forward and backward like inductor but runs PyTorch's own kernels, so a difference is a tracing
error. inductor's kernels have their own test, a slow one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import MESHES, ONE_RANK
from tests.harness import run_ranks
from tests.runs import assert_parity, make_recipe, read_metrics, train

pytestmark = pytest.mark.usefixtures("warm_imports")

Trained = Callable[..., list[dict[str, Any]]]
COMPILED = {"compile__enable": True, "compile__backend": "aot_eager"}
RUN = {"training__steps": 3, "model__n_layers": 2}
VALIDATING = {"validation__enable": True, "validation__freq": 3, "validation__steps": 1}
CASES = {"1 rank": ONE_RANK, **MESHES}


def lines_of(name: str, trained: Trained, **settings: Any) -> list[dict[str, Any]]:
    case = CASES[name]
    return trained(case.num_ranks, **{**RUN, **case.layout, **case.model, **settings})


MESHES_TO_COMPILE = ("1 rank", "fsdp2", "tp2", "pp2", "cp2")
MORE_MESHES = (
    "fsdp2 x tp2",
    "pp2 x tp2",
    "cp2 x tp2",
    "cp2, masked documents",
    "tp2, tied head",
    "tp2, chunked loss",
    "pp2 x fsdp2, 4 parts a rank, Interleaved1F1B",
)


@pytest.mark.parametrize(
    "name",
    [name if name == "pp2" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES_TO_COMPILE],
)
def test_compiled_runs_are_eager_runs(name: str, trained: Trained) -> None:
    """`test_stage_pairs.py` compares the first step of the others, `test_gradients.py` the gradients of tp2."""
    assert_parity(lines_of(name, trained, **COMPILED), lines_of(name, trained))


def test_a_masked_growth_does_not_run_the_code_of_unmasked_blocks(trained: Trained) -> None:
    """In one process: the small model's blocks were compiled before there was a mask. The growth checks its loss."""
    grows = {
        "model__n_layers": 4,
        "growth__stages": '[{at = "2 steps", operator = "random_depth", factor = 2, mask_steps = 4}]',
        "checkpoint__enable": True,
        "training__steps": 4,
    }
    found, expected = (lines_of("1 rank", trained, **{**grows, **more}) for more in (COMPILED, {}))
    assert_parity(found, expected)
    assert [line["num_layers"] for line in found if "grad_norm" in line] == [2, 2, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MESHES_TO_COMPILE, *MORE_MESHES])
def test_compiled_validation_is_the_eager_one(name: str, trained: Trained) -> None:
    """On more meshes, including forward passes compiled without a backward pass."""
    assert_parity(lines_of(name, trained, **COMPILED, **VALIDATING), lines_of(name, trained, **VALIDATING))


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("tp2", 0.0),
        pytest.param("fsdp2", 0.5, marks=pytest.mark.slow),
        pytest.param("fsdp2", 0.0, marks=pytest.mark.slow),
        pytest.param("tp2", 0.5, marks=pytest.mark.slow),
    ],
)
def test_memory_budgets_change_nothing(name: str, budget: float, trained: Trained) -> None:
    """To 1e-6 of the compiled run that keeps all activations."""
    settings = {"activation_checkpoint__mode": "memory_budget", "activation_checkpoint__memory_budget": budget}
    found = lines_of(name, trained, **COMPILED, **settings)
    assert_parity(found, lines_of(name, trained, **COMPILED), first=1e-6, later=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "tp2"])
@pytest.mark.parametrize("mode", ["full", "2", "op"])
def test_compiled_checkpointing_changes_nothing(name: str, mode: str, trained: Trained) -> None:
    """Also to 1e-6; "op" is refused in compiled layers under tensor parallelism."""
    if (mode, name) == ("op", "tp2"):
        pytest.skip("refused: tests/unit/checkpoint/test_impossible.py")
    settings = {"activation_checkpoint__mode": "full" if mode == "full" else "selective"}
    if mode != "full":
        settings["activation_checkpoint__selective_ac_option"] = mode
    found = lines_of(name, trained, **COMPILED, **settings)
    assert_parity(found, lines_of(name, trained, **COMPILED), first=1e-6, later=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1 rank", "tp2", "pp2"])
def test_compiled_growth_is_the_eager_one(name: str, trained: Trained) -> None:
    """The grown model has more of the same blocks and reuses the compiled code."""
    growing = {
        "model__n_layers": 8,
        "training__steps": 4,
        "checkpoint__enable": True,
        "growth__stages": '[{at = "2 steps", factor = 4, optimizer_state = "copy"}]',
    }
    found, expected = (lines_of(name, trained, **growing, **settings) for settings in (COMPILED, {}))
    assert_parity(found, expected)
    assert [line["to_layers"] for line in found if "event" in line] == [8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1 rank", "fsdp2"])
def test_inductor_computes_the_same(name: str, trained: Trained, tmp_path: Path) -> None:
    """Generated kernels, within the tolerances for meshes."""
    case = CASES[name]
    recipe = make_recipe(tmp_path / "run", **RUN, **case.layout, compile__enable=True)
    run_ranks(train, case.num_ranks, case.num_ranks, recipe, timeout_seconds=280)
    assert_parity(read_metrics(tmp_path / "run"), lines_of(name, trained))
