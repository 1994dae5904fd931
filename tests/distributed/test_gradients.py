"""Each parameter's gradient on a mesh equals the one on one rank.

Loss and gradient norm do not show everything: the embedding's gradient is a small part of the norm, and a model whose
embedding is not trained still learns (as once happened with compiled blocks under tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.meshes import CHUNKED, MESHES, ONE_RANK, Case
from tests.harness import WarmRanks
from tests.runs import make_recipe, trainer_of

pytestmark = pytest.mark.usefixtures("warm_imports")

Gradients = dict[str, Tensor]
COMPILED = {"compile__enable": True, "compile__backend": "aot_eager"}


def after_one_batch(rank: int, num_ranks: int, recipe: Any) -> Gradients:
    """Full gradients of this rank's parts after one forward and backward pass."""
    with trainer_of(recipe, num_ranks) as trainer:
        batch = trainer.runtime.data.next_batch()
        num_tokens = trainer.agree(trainer.runtime, batch).num_tokens
        trainer.runtime.engine.forward_backward(batch, num_tokens)
        found = {}
        for name, parameter in trainer.runtime.optimizer.parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            is_sharded = isinstance(parameter.grad, DTensor)
            found[name] = parameter.grad.full_tensor() if is_sharded else parameter.grad
        return found


@pytest.fixture(scope="module")
def gradients(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Gradients]:
    """`gradients(case, **settings)`: the whole model's; all ranks that hold a parameter must agree."""
    known: dict[str, Gradients] = {}

    def of(case: Case, **settings: Any) -> Gradients:
        settings = {"model__n_layers": 2, **case.layout, **case.model, **settings}
        key = f"{case.num_ranks} {sorted(settings.items())}"
        if key not in known:
            recipe = make_recipe(tmp_path_factory.mktemp("gradients") / "run", **settings)
            whole: Gradients = {}
            for found in warm_ranks(after_one_batch, case.num_ranks, case.num_ranks, recipe):
                for name, gradient in found.items():
                    assert whole.setdefault(name, gradient).equal(gradient), f"ranks differ about {name}"
            known[key] = whole
        return known[key]

    return of


def assert_close(found: Gradients, expected: Gradients, tolerance: float) -> None:
    """Each tensor, relative to its largest entry."""
    missing = expected.keys() - found.keys()
    assert not missing, f"no gradient of {missing}"
    for name, reference in expected.items():
        size = reference.abs().max().item()
        assert size > 0, f"the gradient of {name} is zero"
        difference = (found[name] - reference).abs().max().item() / size
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


CHECKED = (
    "fsdp2",
    "tp2",
    "tp2, without loss parallel",
    "tp2, tied head",
    "pp2",
    "pp2, tied head",
    "cp2",
    "fsdp2 x tp2",
    "cp2 x tp2",
)
SPLIT_BACKWARD = ("pp2, ZBVZeroBubble", "pp2, InterleavedZeroBubble")  # not in compiled layers


@pytest.mark.parametrize("name", [*CHECKED, *SPLIT_BACKWARD])
def test_gradients_agree_with_one_rank(name: str, gradients: Callable[..., Gradients]) -> None:
    """To 1e-5."""
    case = MESHES[name]
    assert_close(gradients(case), gradients(Case(1, ONE_RANK.layout, case.model)), 1e-5)


@pytest.mark.parametrize(
    "name", [name if name == "tp2" else pytest.param(name, marks=pytest.mark.slow) for name in CHECKED]
)
def test_compiled_gradients_agree_with_one_rank(name: str, gradients: Callable[..., Gradients]) -> None:
    """Compiled blocks and loss against eager ones on one rank."""
    case = MESHES[name]
    assert_close(gradients(case, **COMPILED), gradients(Case(1, ONE_RANK.layout, case.model)), 1e-5)


@pytest.mark.parametrize("name", ["1 rank", "tp2", "pp2"])
def test_chunked_loss_has_the_gradients_of_the_plain_one(name: str, gradients: Callable[..., Gradients]) -> None:
    """On the same mesh, to 1e-6."""
    case = {"1 rank": ONE_RANK, **MESHES}[name]
    assert_close(gradients(case, **CHUNKED), gradients(case), 1e-6)
