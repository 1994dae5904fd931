"""What one global batch comes to on a mesh: loss, each gradient whole, its norm and the clipped gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.meshes import Case
from tests.harness import WarmRanks
from tests.runs import make_recipe, trainer_of
from titan_growth.engine.engine import num_valid_tokens

Tensors = dict[str, Tensor]


@dataclass
class Batch:
    """Of one rank, or of all: then every parameter is there."""

    loss: float
    norm: float
    weights: Tensors
    """Before the step."""
    gradients: Tensors
    clipped: Tensors
    labels: list[int]
    """Labels that count, of each microbatch of this rank."""

    @property
    def norm_of_gradients(self) -> float:
        """Of the whole gradients, in float64."""
        return sum(float(gradient.double().square().sum()) for gradient in self.gradients.values()) ** 0.5


def one_batch(rank: int, num_ranks: int, recipe: Any) -> Batch:
    """Forward, backward and clipping of the run's first batch on this rank."""
    with trainer_of(recipe, num_ranks) as trainer:
        runtime = trainer.runtime
        batch = runtime.data.next_batch()
        labels = [num_valid_tokens([microbatch]) for microbatch in batch]
        loss = runtime.engine.forward_backward(batch, trainer.agree(runtime, batch).num_tokens)
        parameters = runtime.optimizer.parameters
        weights = {name: whole(parameter.detach()).clone() for name, parameter in parameters.items()}
        gradients = {name: whole(parameter.grad).clone() for name, parameter in parameters.items()}
        norm = runtime.optimizer.clip()
        clipped = {name: whole(parameter.grad) for name, parameter in parameters.items()}
        return Batch(loss.item(), norm.item(), weights, gradients, clipped, labels)


def whole(tensor: Tensor | None) -> Tensor:
    """All of a sharded tensor."""
    assert tensor is not None, "no gradient"
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Batches:
    """`batches(case, **settings)`: the batch on a mesh, computed once. All ranks must agree about it."""

    def __init__(self, ranks: WarmRanks, folder: Path) -> None:
        self.ranks = ranks
        self.folder = folder
        self.known: dict[str, Batch] = {}

    def __call__(self, case: Case, **settings: Any) -> Batch:
        settings = {"model__n_layers": 2, "model__dim": 16, **case.layout, **case.model, **settings}
        key = f"{case.num_ranks} {sorted(settings.items())}"
        if key not in self.known:
            recipe = make_recipe(self.folder / f"run-{len(self.known)}", **settings)
            self.known[key] = joined(self.ranks(one_batch, case.num_ranks, case.num_ranks, recipe))
        return self.known[key]


def joined(ranks: list[Batch]) -> Batch:
    """The batch of all ranks."""
    result = Batch(ranks[0].loss, ranks[0].norm, {}, {}, {}, [count for rank in ranks for count in rank.labels])
    for rank in ranks:
        assert (rank.loss, rank.norm) == (result.loss, result.norm), "ranks differ about loss or norm"
        for mine, theirs in (
            (result.weights, rank.weights),
            (result.gradients, rank.gradients),
            (result.clipped, rank.clipped),
        ):
            for name, tensor in theirs.items():
                assert mine.setdefault(name, tensor).equal(tensor), f"ranks differ about {name}"
    return result


def assert_same(found: Batch, expected: Batch, tolerance: float = 1e-5) -> None:
    """Loss and gradients agree; each gradient relative to its largest entry."""
    assert abs(found.loss - expected.loss) <= tolerance * expected.loss
    assert expected.gradients.keys() <= found.gradients.keys()  # a pipeline holds copies of tied parameters
    for name, reference in expected.gradients.items():
        size = reference.abs().max().item()
        assert size > 0, f"the gradient of {name} is zero"
        difference = (found.gradients[name] - reference).abs().max().item() / size
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


def assert_clipped(batch: Batch, max_norm: float) -> None:
    """The norm is that of the whole gradients, and each has been scaled by it."""
    exact = batch.norm_of_gradients
    assert exact > max_norm, "nothing is clipped"
    assert abs(batch.norm - exact) <= 1e-6 * exact, f"norm {batch.norm}, of the whole gradients {exact}"
    for name, gradient in batch.gradients.items():
        torch.testing.assert_close(batch.clipped[name], gradient * (max_norm / exact), rtol=1e-4, atol=1e-9)
