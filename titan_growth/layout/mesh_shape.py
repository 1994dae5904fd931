"""Degrees of a mesh, and whether they and the batch fit the number of ranks. Pure arithmetic.

The axes are always `pp, dp_replicate, dp_shard, cp, tp`, outermost first, so that the axes with the most communication
stay within a node. Process groups are in `mesh.py`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from math import prod
from typing import NamedTuple

from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.tools.findings import Findings

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class MeshShape:
    """Degrees of the five axes. Their product is the number of ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def degrees(self) -> tuple[int, ...]:
        """The degrees in the order of `AXES`."""
        return astuple(self)

    @property
    def dp_degree(self) -> int:
        """Ranks that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp_degree(self) -> int:
        """Ranks that FSDP shards over, context-parallel ones included: they hold the same weights."""
        return self.dp_shard * self.cp

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole mesh."""
        return prod(self.degrees)

    def __str__(self) -> str:
        named = [f"{axis} {degree}" for axis, degree in zip(AXES, self.degrees, strict=True) if degree > 1]
        return " x ".join(named) if named else "1 rank"


_SHARD_DEGREE = "parallelism.data_parallel_shard_degree"

_KEY_OF = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}


def resolve_mesh(section: ParallelismConfig, num_ranks: int, found: Findings) -> MeshShape | None:
    """The mesh shape of a `[parallelism]` table on `num_ranks`; None if it does not fit."""
    shard = section.data_parallel_shard_degree
    if shard == 0:
        found.problem(_SHARD_DEGREE, "must be -1 (all ranks that are left) or at least 1, got 0", "Leave it at -1")
        return None
    others = MeshShape(**{axis: getattr(section, key) for axis, key in _KEY_OF.items()})
    if shard == -1:
        if num_ranks % others.num_ranks:
            _report_no_divisor(others, num_ranks, found)
            return None
        shard = num_ranks // others.num_ranks
    shape = replace(others, dp_shard=shard)
    if shape.num_ranks != num_ranks:
        there_are = "there is 1 rank" if num_ranks == 1 else f"there are {num_ranks} ranks"
        named_axes = zip(AXES, shape.degrees, strict=True)
        product = " x ".join(f"{axis} {n}" for axis, n in named_axes if n > 1 or axis.startswith("dp"))
        hint = f"Set it to -1 to use all that are left, or NGPU to {shape.num_ranks}"
        found.problem(_SHARD_DEGREE, f"{product} = {shape.num_ranks}, but {there_are}", hint)
        return None
    return shape


def _report_no_divisor(others: MeshShape, num_ranks: int, found: Findings) -> None:
    """Reports that the other axes leave no whole number of ranks for `dp_shard`."""
    largest = max(_KEY_OF, key=lambda axis: getattr(others, axis))
    message = f"{others.num_ranks} does not divide the {'1 rank' if num_ranks == 1 else f'{num_ranks} ranks'}"
    if getattr(others, largest) < others.num_ranks:
        message = f"{others} = {message}"
    found.problem(f"parallelism.{_KEY_OF[largest]}", message, "Set it to a divisor, or NGPU to a multiple")


class BatchShape(NamedTuple):
    """The batch of an optimizer step on a mesh."""

    global_batch_size: int
    num_accumulation_steps: int


def resolve_batch(
    global_batch_size: int, local_batch_size: int, shape: MeshShape, found: Findings
) -> BatchShape | None:
    """The batch on a mesh, None when it does not fit; -1 becomes local x data-parallel degree."""
    per_step = local_batch_size * shape.dp_degree
    if global_batch_size == -1:
        return BatchShape(per_step, 1)
    if global_batch_size % per_step:
        message = (
            f"{global_batch_size} is not a multiple of training.local_batch_size {local_batch_size} x data-parallel "
            f"degree {shape.dp_degree} = {per_step}"
        )
        below = global_batch_size // per_step * per_step
        fitting = f"{below} or {below + per_step}" if below else str(per_step)
        found.problem("training.global_batch_size", message, f"{fitting} would fit")
        return None
    return BatchShape(global_batch_size, global_batch_size // per_step)
