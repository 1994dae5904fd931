"""Muon: the update of a hidden matrix is its momentum with all singular values near 1 (Jordan et al., 2024).

Embedding, head and norms are AdamW's. Orthogonalising needs the whole matrix, and ranks hold shards. So the matrices of
a rank group are handled in rounds, in each of which every rank owns one:

    momentum, on shards -> each shard to the owner of its matrix -> orthogonalised there -> the shards back -> weights

Both ways are one all-to-all in bfloat16, the type that the iteration computes in: sharding adds no rounding. Matrices
go in the order of their cost, so those of one round cost about the same and no rank waits long for another. Replicas
share the work too. A rank never holds more than one whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.models.initialize import local_and_offset
from titan_growth.models.roles import layer_of
from titan_growth.optimizers.adam import ADAMW
from titan_growth.optimizers.base import Site, StateTensor, UpdateRule, options_of, register_optimizer
from titan_growth.tools.collectives import gather_objects
from titan_growth.tools.shards import local_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, with a large slope at zero: few iterations bring singular values to about 0.7 to 1.2."""
EPS = 1e-7
MOMENTUM = "momentum_buffer"
"""Its key, and its meaning, are those of `torch.optim.Muon`."""


def orthogonalised(matrix_MN: Tensor, num_iterations: int) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly; bfloat16. Newton-Schulz in the order of `torch.optim.Muon`."""
    a, b, c = COEFFICIENTS
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x = matrix_MN.to(torch.bfloat16, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=EPS))  # the spectral norm is at most this one
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def lr_factor(adjust_lr_fn: str, shape: Sequence[int]) -> float:
    """Factor on the learning rate of a matrix, under PyTorch's names.

    match_rms_adamw: elements change as much as under AdamW, so one learning rate and weight decay suit both (Liu et
    al., 2025). original: by the square root of the ratio of rows to columns, if that is above 1.
    """
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Box(NamedTuple):
    """A rank's part of a matrix."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, matrix: Tensor) -> Box:
        """This rank's."""
        local, offset = local_and_offset(matrix)
        return cls(tuple(offset), tuple(local.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def within(self, whole: Tensor) -> Tensor:
        """A view of this part of a whole matrix."""
        (row, column), (rows, columns) = self.offset, self.sizes
        return whole[row : row + rows, column : column + columns]


class Exchange:
    """Brings shards to the owners of their matrices, and back. Made on all ranks of the group together.

    Args:
        matrices: the parameters, the same and in the same order on every rank.
    """

    def __init__(self, matrices: Sequence[Tensor], site: Site) -> None:
        self.site = site
        self.rank, self.num_ranks = dist.get_rank(site.group), dist.get_world_size(site.group)
        everyone = gather_objects([Box.of(matrix) for matrix in matrices], site.group)
        self._boxes = {matrix: [boxes[at] for boxes in everyone] for at, matrix in enumerate(matrices)}

    def rounds(self, matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The matrices in rounds; in each, rank i owns the i-th."""
        by_cost = sorted(matrices, key=lambda matrix: -matrix.numel() * min(matrix.shape))
        for start in range(0, len(by_cost), self.num_ranks):
            yield by_cost[start : start + self.num_ranks]

    def collected(self, matrices: Sequence[Tensor], pieces: Sequence[Tensor]) -> Tensor | None:
        """The matrix that this rank owns in a round, whole; None if there are not as many.

        Args:
            pieces: this rank's shard of the update of each matrix, bfloat16.
        """
        sent = [
            piece if self._sends(matrix, self.rank) else piece[:0]
            for matrix, piece in zip(matrices, pieces, strict=True)
        ]
        owned = matrices[self.rank] if self.rank < len(matrices) else None
        boxes = [] if owned is None else self._boxes[owned]
        wanted = [box.numel if owned is not None and self._sends(owned, rank) else 0 for rank, box in enumerate(boxes)]
        received = self._swap(sent, wanted)
        if owned is None:
            return None
        whole = torch.empty(owned.shape, dtype=torch.bfloat16, device=self.site.device)
        for box, values in zip(boxes, received, strict=True):
            if values.numel():
                box.within(whole).copy_(values.view(box.sizes))
        return whole

    def returned(self, matrices: Sequence[Tensor], whole: Tensor | None) -> list[Tensor]:
        """This rank's shards of what the owners of a round have made."""
        owned = [] if whole is None else [box.within(whole) for box in self._boxes[matrices[self.rank]]]
        mine = [self._boxes[matrix][self.rank] for matrix in matrices]
        received = self._swap(owned, [box.numel for box in mine])
        return [values.view(box.sizes) for box, values in zip(mine, received, strict=False)]

    def _sends(self, matrix: Tensor, rank: int) -> bool:
        """Whether a rank is the first with its part; replicas have the same."""
        boxes = self._boxes[matrix]
        return boxes.index(boxes[rank]) == rank

    def _swap(self, pieces: Sequence[Tensor], numels: Sequence[int]) -> list[Tensor]:
        """Sends the i-th piece to rank i, for as many as there are; returns what came from each rank, flat."""
        given = self._for_all([piece.numel() for piece in pieces])
        wanted = self._for_all(numels)
        flat = [piece.to(self.site.device).flatten() for piece in pieces]
        outgoing = torch.cat(flat) if flat else torch.empty(0, dtype=torch.bfloat16, device=self.site.device)
        incoming = torch.empty(sum(wanted), dtype=torch.bfloat16, device=self.site.device)
        # As bytes, which every backend can send.
        dist.all_to_all_single(
            incoming.view(torch.uint8),
            outgoing.view(torch.uint8),
            [2 * numel for numel in wanted],
            [2 * numel for numel in given],
            group=self.site.group,
        )
        return list(incoming.split(wanted))

    def _for_all(self, numels: Sequence[int]) -> list[int]:
        """One number for each rank; 0 for those without."""
        return [*numels, *(0 for _ in range(self.num_ranks - len(numels)))]


class Muon(torch.optim.Optimizer):
    """Muon over matrices that may be sharded. On one rank it computes what `torch.optim.Muon` does, bit for bit.

    Args:
        options: those of the optimizer `Muon`, all of them.
    """

    def __init__(
        self, groups: list[dict[str, Any]], section: OptimizerConfig, options: Mapping[str, Any], site: Site
    ) -> None:
        super().__init__(groups, {"lr": section.lr, "weight_decay": section.weight_decay, **options})
        matrices = [matrix for group in self.param_groups for matrix in group["params"]]
        sharded = any(isinstance(matrix, DTensor) for matrix in matrices)
        self._exchange = Exchange(matrices, site) if sharded and site.group is not None else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # PyTorch's may get one and return a loss
        """Updates every matrix that has a gradient; all ranks of the group together."""
        assert closure is None, "there is no closure to call"
        group_of = {
            matrix: group for group in self.param_groups for matrix in group["params"] if matrix.grad is not None
        }
        for matrices in self._exchange.rounds([*group_of]) if self._exchange else ([matrix] for matrix in group_of):
            directions = [self._direction(matrix, group_of[matrix]) for matrix in matrices]
            updates = self._orthogonalised(matrices, directions, [group_of[matrix]["ns_steps"] for matrix in matrices])
            for matrix, update in zip(matrices, updates, strict=True):
                group, local = group_of[matrix], local_of(matrix)
                local.mul_(1 - group["lr"] * group["weight_decay"])
                local.add_(update.to(local.device), alpha=-group["lr"] * lr_factor(group["adjust_lr_fn"], matrix.shape))

    def _direction(self, matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
        """This rank's shard of the matrix to orthogonalise; takes the gradient into the momentum."""
        assert matrix.grad is not None
        gradient, momentum = local_of(matrix.grad), local_of(self.state[matrix][MOMENTUM])
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        return direction.to(torch.bfloat16)

    def _orthogonalised(self, matrices: list[Tensor], directions: list[Tensor], iterations: list[int]) -> list[Tensor]:
        """This rank's shards of the updates of a round."""
        if self._exchange is None:
            return [orthogonalised(one, number) for one, number in zip(directions, iterations, strict=True)]
        whole = self._exchange.collected(matrices, directions)
        if whole is not None:
            whole = orthogonalised(whole, iterations[self._exchange.rank])
        return self._exchange.returned(matrices, whole)


class MuonRule:
    """Muon's rule: the momentum alone is kept."""

    name = "Muon"
    state = (StateTensor(MOMENTUM, 1),)

    def make(self, groups: list[dict[str, Any]], section: OptimizerConfig, site: Site) -> torch.optim.Optimizer:
        """See `Muon`."""
        return Muon(groups, section, options_of(section), site)

    def width_factor(
        self, shape: Sequence[int], base_shape: Sequence[int], reads: int, section: OptimizerConfig
    ) -> float:
        """Under muP a matrix's update has a spectral norm in proportion to sqrt(outputs / inputs) (Yang, Simon and
        Bernstein, 2023, arXiv 2310.17813, condition 1).

        With all singular values near s, an input x of elements near 1 has |x| = sqrt(inputs), and its output changes by
        s sqrt(inputs / outputs) an element, however x is aligned. So Adam's 1 / n, for updates whose alignment grows
        with the width, would be wrong. Here s is the learning rate times `lr_factor`. For matrices that keep their
        proportions the target is that of the base: "original" needs no factor, "match_rms_adamw" the root of Adam's.
        """
        adjust = options_of(section)["adjust_lr_fn"]
        wanted = math.sqrt(shape[1 - reads] / shape[reads] * base_shape[reads] / base_shape[1 - reads])
        return wanted * lr_factor(adjust, base_shape) / lr_factor(adjust, shape)


@register_optimizer("Muon")
class MuonAndAdamW:
    """Muon for the matrices of the layers, AdamW for everything else. Options have the names of `torch.optim.Muon`."""

    rules: tuple[UpdateRule, ...] = (MuonRule(), ADAMW)
    options: Mapping[str, Any] = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}

    def rule_of(self, name: str, num_dims: int) -> UpdateRule:
        """By name and dimensions: a matrix within a layer is hidden."""
        return self.rules[0 if layer_of(name) is not None and num_dims == 2 else 1]

    def problem(self, options: Mapping[str, Any]) -> str | None:
        """Values out of range."""
        if not 0 <= options["momentum"] < 1:
            return f"momentum must be at least 0 and less than 1, got {options['momentum']}"
        if not 1 <= options["ns_steps"] < 100:
            return f"ns_steps must be from 1 to 99, got {options['ns_steps']}"
        if options["adjust_lr_fn"] not in ("match_rms_adamw", "original"):
            return f'adjust_lr_fn must be "match_rms_adamw" or "original", got {options["adjust_lr_fn"]!r}'
        return None
