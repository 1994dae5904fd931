"""How the ranks are divided: degrees, their checks, and the `DeviceMesh` made of them.

The axes are always `pp, dp_replicate, dp_shard, cp, tp`, outermost first, so ranks of one node share the axes that talk
the most. `MeshShape` is pure arithmetic and can be planned without devices; `Mesh` holds the process groups. Meshes are
made once per shape and kept for the life of the process: DTensor caches them, so destroying or remaking one breaks
later steps (design.md section 6), and a run that grows to another mesh and back finds the first one again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.tools.errors import ConfigError, Problem

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
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def dp_degree(self) -> int:
        """Ranks that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp_degree(self) -> int:
        """Ranks that FSDP shards over: context-parallel ranks hold the same weights, so they share them too."""
        return self.dp_shard * self.cp

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole mesh."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    def __str__(self) -> str:
        named = [f"{axis} {degree}" for axis, degree in zip(AXES, self.degrees, strict=True) if degree > 1]
        return " x ".join(named) if named else "1 rank"


def resolve_mesh(section: ParallelismConfig, num_ranks: int) -> tuple[MeshShape | None, list[Problem]]:
    """The mesh shape of a `[parallelism]` table on so many ranks, or what does not fit."""
    key = "parallelism.data_parallel_shard_degree"
    shard = section.data_parallel_shard_degree
    if shard == 0:
        return None, [Problem(key, "must be -1 (all ranks that are left) or at least 1, got 0", "Leave it at -1")]
    fixed = {
        "pipeline_parallel_degree": section.pipeline_parallel_degree,
        "data_parallel_replicate_degree": section.data_parallel_replicate_degree,
        "context_parallel_degree": section.context_parallel_degree,
        "tensor_parallel_degree": section.tensor_parallel_degree,
    }
    if shard == -1:
        taken = prod(fixed.values())
        if num_ranks % taken:
            named = {name: degree for name, degree in fixed.items() if degree > 1}
            largest = max(named, key=lambda name: named[name])
            product = " x ".join(f"{_AXIS_OF[name]} {degree}" for name, degree in named.items())
            message = f"{taken} does not divide the {'1 rank' if num_ranks == 1 else f'{num_ranks} ranks'}"
            if len(named) > 1:
                message = f"{product} = {message}"
            hint = "Set it to a divisor, or NGPU to a multiple"
            return None, [Problem(f"parallelism.{largest}", message, hint)]
        shard = num_ranks // taken
    shape = MeshShape(
        pp=section.pipeline_parallel_degree,
        dp_replicate=section.data_parallel_replicate_degree,
        dp_shard=shard,
        cp=section.context_parallel_degree,
        tp=section.tensor_parallel_degree,
    )
    if shape.num_ranks != num_ranks:
        there_are = "there is 1 rank" if num_ranks == 1 else f"there are {num_ranks} ranks"
        named_axes = zip(AXES, shape.degrees, strict=True)
        product = " x ".join(f"{axis} {n}" for axis, n in named_axes if n > 1 or axis.startswith("dp"))
        message = f"{product} = {shape.num_ranks}, but {there_are}"
        return None, [Problem(key, message, f"Set it to -1 to use all that are left, or NGPU to {shape.num_ranks}")]
    return shape, []


_AXIS_OF = {
    "pipeline_parallel_degree": "pp",
    "data_parallel_replicate_degree": "dp_replicate",
    "context_parallel_degree": "cp",
    "tensor_parallel_degree": "tp",
}


def resolve_batch(global_batch_size: int, local_batch_size: int, shape: MeshShape) -> tuple[int, int, list[Problem]]:
    """(global batch size, gradient accumulation steps, problems) on a mesh; -1 becomes local x data-parallel degree."""
    per_step = local_batch_size * shape.dp_degree
    if global_batch_size == -1:
        return per_step, 1, []
    if global_batch_size % per_step:
        message = (
            f"{global_batch_size} is not a multiple of training.local_batch_size {local_batch_size} x data-parallel "
            f"degree {shape.dp_degree} = {per_step}"
        )
        below = global_batch_size // per_step * per_step
        fitting = f"{below} or {below + per_step}" if below else str(per_step)
        return global_batch_size, 1, [Problem("training.global_batch_size", message, f"{fitting} would fit")]
    return global_batch_size, global_batch_size // per_step, []


class Mesh:
    """A mesh shape with its process groups, seen from this rank."""

    _cache: dict[tuple[str, MeshShape], Mesh] = {}

    def __init__(self, shape: MeshShape, device_type: str) -> None:
        self.shape = shape
        self.device_type = device_type

    @classmethod
    def get(cls, shape: MeshShape, device_type: str) -> Mesh:
        """The one mesh of this shape in this process.

        Raises:
            ConfigError: when the shape does not fit the number of ranks.
        """
        import torch.distributed as dist

        if shape.num_ranks != dist.get_world_size():
            raise ConfigError(f"mesh {shape} needs {shape.num_ranks} ranks, but there are {dist.get_world_size()}")
        return cls._cache.setdefault((device_type, shape), cls(shape, device_type))

    @cached_property
    def device_mesh(self):  # type: ignore[no-untyped-def]  # DeviceMesh, without importing torch at module level
        """The full five-axis `DeviceMesh`; axes of degree 1 are kept, so slicing by name always works."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device_type, self.shape.degrees, mesh_dim_names=AXES)

    def rank_of(self, axis: str) -> int:
        """This rank's place on an axis."""
        place = self.device_mesh.get_local_rank(axis)
        assert place >= 0, "this rank is not part of the mesh"
        return int(place)

    def group_of(self, axis: str):  # type: ignore[no-untyped-def]  # ProcessGroup
        """The process group of an axis."""
        return self.device_mesh.get_group(axis)

    @cached_property
    def fsdp_mesh(self):  # type: ignore[no-untyped-def]  # DeviceMesh
        """What `fully_shard` takes: `dp_shard` and `cp` as one axis, behind `dp_replicate` where there are replicas."""
        from torch.distributed.device_mesh import DeviceMesh

        sharded = self.device_mesh["dp_shard"]
        if self.shape.cp > 1:
            sharded = self.device_mesh["dp_shard", "cp"]._flatten("fsdp")
        if self.shape.dp_replicate == 1:
            return sharded
        return DeviceMesh._concatenate([self.device_mesh["dp_replicate"], sharded])

    @property
    def dp_rank(self) -> int:
        """This rank's place among those that see different sequences."""
        return self.rank_of("dp_replicate") * self.shape.dp_shard + self.rank_of("dp_shard")

    @property
    def speaks_for_its_data(self) -> bool:
        """True on one of the ranks that see the same sequences, so that each sequence is counted once."""
        return all(self.rank_of(axis) == 0 for axis in ("pp", "cp", "tp"))
