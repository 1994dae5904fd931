"""Muon: PyTorch's own on one rank, the same on sharded matrices, whatever the axes and however uneven."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.harness import WarmRanks
from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.engine.optimizer import Optimizer
from titan_growth.optimizers.base import Site
from titan_growth.optimizers.muon import orthogonalised

SHAPES = {
    "layers.0.wide.weight": (12, 20),
    "layers.0.tall.weight": (33, 8),
    "layers.1.square.weight": (16, 16),
    "layers.1.few_rows.weight": (3, 10),
    "layers.2.wide.weight": (12, 20),
}
OTHERS = {"tok_embeddings.weight": (30, 8), "layers.0.norm.weight": (8,), "output.weight": (30, 8)}
SITE = Site(torch.device("cpu"))


class Model(nn.Module):
    """Parameters under given names."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(value))


def values(seed: int, shapes: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def section(**options: Any) -> OptimizerConfig:
    return OptimizerConfig(name="Muon", weight_decay=0.1, beta1=0.8, beta2=0.9, options=options)


def trained(optimizer: Optimizer, shapes: dict[str, Any], num_steps: int = 3) -> None:
    """Steps under changing gradients and rates."""
    for step in range(num_steps):
        for name, gradient in values(100 + step, shapes).items():
            parameter = optimizer.parameters[name]
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            else:
                parameter.grad = gradient
        optimizer.step(0.01 * (step + 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjust_lr_fn": "original"},
        {"momentum": 0.5, "nesterov": False, "ns_steps": 3},
    ],
    ids=str,
)
def test_on_one_rank_it_is_pytorchs_bit_for_bit(options: dict[str, Any]) -> None:
    """Hidden matrices under `torch.optim.Muon`, everything else under AdamW."""
    model, twin = (Model(values(1, SHAPES | OTHERS)) for _ in range(2))
    optimizer = Optimizer([model], section(**options), max_norm=1.0)
    theirs = dict(twin.named_parameters())
    muon = torch.optim.Muon(
        [theirs[name] for name in SHAPES], weight_decay=0.1, **{"adjust_lr_fn": "match_rms_adamw", **options}
    )
    adamw = torch.optim.AdamW([theirs[name] for name in OTHERS], betas=(0.8, 0.9), weight_decay=0.1, fused=True)
    for step in range(3):
        for name, gradient in values(100 + step, SHAPES | OTHERS).items():
            theirs[name].grad = gradient
        for one in (muon, adamw):
            one.param_groups[0]["lr"] = 0.01 * (step + 1)
            one.step()
    trained(optimizer, SHAPES | OTHERS)
    for name, parameter in optimizer.parameters.items():
        assert torch.equal(parameter, theirs[name]), name
    assert {key for name, key, _ in optimizer.named_state() if name in SHAPES} == {"momentum_buffer"}
    for name in SHAPES:
        assert torch.equal(optimizer.states[name]["momentum_buffer"], muon.state[theirs[name]]["momentum_buffer"])


def test_singular_values_come_near_one() -> None:
    for shape in SHAPES.values():
        singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape), 5).float())
        assert singular.min() > 0.3
        assert singular.max() < 1.3


MESHES: dict[str, tuple[dict[str, int], list[Any]]] = {
    "rows": ({"fsdp": 4}, [Shard(0)]),
    "columns": ({"tp": 4}, [Shard(1)]),
    "rows and columns": ({"fsdp": 2, "tp": 2}, [Shard(0), Shard(1)]),
    "replicas of rows": ({"replicate": 2, "fsdp": 2}, [Replicate(), Shard(0)]),
    "replicas": ({"replicate": 4}, [Replicate()]),
}


@pytest.fixture(scope="module")
def ranks() -> Any:
    warm = WarmRanks()
    yield warm
    warm.close()


def _sharded(rank: int, name: str) -> tuple[dict[str, Tensor], list[int]]:
    """(all parameters after some steps, how many matrices this rank orthogonalised)."""
    axes, placements = MESHES[name]
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    given = {name: distribute_tensor(value, mesh, placements) for name, value in values(1, SHAPES).items()}
    site = Site(torch.device("cpu"), torch.distributed.group.WORLD)
    optimizer = Optimizer([Model(given)], section(), max_norm=1.0, site=site)
    counts = []

    def counted(matrix: Tensor, num_iterations: int) -> Tensor:
        counts.append(matrix.numel())
        return orthogonalised(matrix, num_iterations)

    from titan_growth.optimizers import muon

    muon.orthogonalised = counted
    try:
        trained(optimizer, SHAPES)
    finally:
        muon.orthogonalised = orthogonalised
    return {name: parameter.full_tensor().detach() for name, parameter in optimizer.parameters.items()}, counts


@pytest.mark.parametrize("name", MESHES)
def test_sharded_matrices_are_those_of_one_rank(name: str, ranks: WarmRanks) -> None:
    """Bit for bit: gathering rounds nothing. And the work is shared: 5 matrices in 2 rounds of 4 ranks."""
    optimizer = Optimizer([Model(values(1, SHAPES))], section(), max_norm=1.0, site=SITE)
    trained(optimizer, SHAPES)
    results = ranks(_sharded, 4, name)
    for found, _ in results:
        for matrix, parameter in optimizer.parameters.items():
            assert torch.equal(found[matrix], parameter), matrix
    assert [len(counts) for _, counts in results] == [3 * 2, 3, 3, 3]
