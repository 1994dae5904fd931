"""Recomputing activations changes no bit, and really happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.meshes import FIVE_LAYERS, MESHES, ONE_RANK
from tests.harness import WarmRanks
from tests.runs import make_recipe, trainer_of, without_timings
from titan_growth.stages.activation_checkpoint import Checkpointed

pytestmark = pytest.mark.usefixtures("warm_imports")

NONE = {"activation_checkpoint__mode": "none"}
FULL = {"activation_checkpoint__mode": "full"}
EVERY_SECOND = {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "2"}
PER_OPERATION = {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"}

WHOLE_LAYERS = {"full": FULL, "every second layer": EVERY_SECOND}
ALL_MODES = {**WHOLE_LAYERS, "per operation": PER_OPERATION}
CASES = {"1 rank": ONE_RANK, **MESHES}


def assert_same_bits(name: str, settings: dict[str, Any], trained: Callable[..., Any]) -> None:
    """The lines of three steps equal those of the run that keeps all activations."""
    case, run = CASES[name], {"training__steps": 3, "model__n_layers": 2}
    found, expected = (trained(case.num_ranks, **run, **case.layout, **mode) for mode in (settings, NONE))
    assert without_timings(found) == without_timings(expected)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", ["1 rank", "fsdp2", "tp2", "pp2", pytest.param("cp2", marks=pytest.mark.slow)])
def test_recomputing_changes_no_bit(name: str, mode: str, trained: Callable[..., Any]) -> None:
    assert_same_bits(name, ALL_MODES[mode], trained)


@pytest.mark.parametrize("mode", WHOLE_LAYERS)
@pytest.mark.parametrize("name", ["pp2, ZBVZeroBubble"])
def test_recomputing_changes_no_bit_when_the_backward_pass_is_split(
    name: str, mode: str, trained: Callable[..., Any]
) -> None:
    """Single operations cannot be recomputed there, and are refused (tests/unit/checkpoint/test_impossible.py)."""
    assert_same_bits(name, WHOLE_LAYERS[mode], trained)


class CountProducts(TorchDispatchMode):
    """Counts executed matrix products. The profiler would also count those that a checkpoint skips."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def products_of_a_batch(rank: int, num_ranks: int, recipe: Any) -> int:
    """Matrix products of one forward and backward pass."""
    with trainer_of(recipe, num_ranks) as trainer, CountProducts() as products:
        batch = trainer.runtime.data.next_batch()
        num_tokens = trainer.agree(trainer.runtime, batch).num_tokens
        trainer.runtime.engine.forward_backward(batch, num_tokens)
        return products.count


def products_of_a_compiled_batch(rank: int, num_ranks: int, recipe: Any) -> int:
    """The same with the profiler, because the compiler refuses dispatch modes; of a second batch, already compiled."""
    with trainer_of(recipe, num_ranks) as trainer:
        for context in (contextlib.nullcontext(), torch.profiler.profile()):
            batch = trainer.runtime.data.next_batch()
            num_tokens = trainer.agree(trainer.runtime, batch).num_tokens
            with context as profile:
                trainer.runtime.engine.forward_backward(batch, num_tokens)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")


LINEAR = 7
"""Linear layers of a block: wq, wk, wv, wo, w1, w2, w3."""
PLAIN = 3 * (4 * LINEAR + 1)
"""Products of 4 layers and the head: one forward, two backward."""


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [
        (NONE, 0),
        (FULL, 4 * LINEAR),
        (EVERY_SECOND, 2 * LINEAR),
        ({**EVERY_SECOND, "activation_checkpoint__selective_ac_option": "3"}, LINEAR),
        (PER_OPERATION, 4 * 3),  # every other product of a layer is kept, beginning with the first
        # wq and wo have the shape of what is named, and of the five others every other is kept: wk, w1, w2.
        ({**PER_OPERATION, "activation_checkpoint__per_op_sac_force_recompute_mm_shapes_by_fqns": ["wo"]}, 4 * (2 + 2)),
        # The result of a layer's last product is not needed, and `early_stop` does without it.
        ({**FULL, "activation_checkpoint__early_stop": True}, 4 * (LINEAR - 1)),
    ],
)
def test_products_are_recomputed(
    settings: dict[str, Any], recomputed: int, warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As many as the mode implies: checkpointing is neither silently off nor overdone."""
    recipe = make_recipe(tmp_path_factory.mktemp("products") / "run", **ONE_RANK.layout, **settings)
    assert warm_ranks(products_of_a_batch, 1, 1, recipe) == [PLAIN + recomputed]


BUDGET = {"activation_checkpoint__mode": "memory_budget"}


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [
        pytest.param({**BUDGET, "activation_checkpoint__memory_budget": 1.0}, 0, marks=pytest.mark.slow),
        ({**BUDGET, "activation_checkpoint__memory_budget": 0.0}, 4 * (LINEAR - 1)),  # the last product is not needed
        pytest.param(FULL, 4 * (LINEAR - 1), marks=pytest.mark.slow),
        pytest.param(EVERY_SECOND, 2 * (LINEAR - 1), marks=pytest.mark.slow),
        pytest.param(PER_OPERATION, 4 * 3, marks=pytest.mark.slow),
    ],
)
def test_compiled_products_are_recomputed(
    settings: dict[str, Any], recomputed: int, warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compiled = {"compile__enable": True, "compile__backend": "aot_eager", "compile__components": ["model"]}
    recipe = make_recipe(tmp_path_factory.mktemp("products") / "run", **ONE_RANK.layout, **compiled, **settings)
    assert warm_ranks(products_of_a_compiled_batch, 1, 1, recipe) == [PLAIN + recomputed]


def checkpointed_layers(rank: int, num_ranks: int, recipe: Any) -> set[int]:
    """Global ids of this rank's recomputed layers."""
    with trainer_of(recipe, num_ranks) as trainer:
        layers = [item for part in trainer.runtime.engine.model.parts for item in part.layers.items()]
        return {int(layer) for layer, block in layers if isinstance(block.forward, Checkpointed)}


@pytest.mark.parametrize("name", ["1 rank", "pp2", "pp2, less layers 2 and 1", "pp2, ZBVZeroBubble", "pp4"])
def test_layers_are_chosen_by_their_global_id(
    name: str, warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Layers 1 and 3 of five, on every pipeline split."""
    case = CASES[name]
    recipe = make_recipe(tmp_path_factory.mktemp("layers") / "run", **case.layout, **FIVE_LAYERS, **EVERY_SECOND)
    assert set.union(*warm_ranks(checkpointed_layers, case.num_ranks, case.num_ranks, recipe)) == {1, 3}
