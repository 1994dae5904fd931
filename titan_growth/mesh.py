"""How the ranks are divided: degrees, their checks, and the `DeviceMesh` made of them.

The axes are always `pp, dp_replicate, dp_shard, cp, tp`, outermost first, so ranks of one node share the axes that talk
the most. `MeshShape` is pure arithmetic and can be planned without devices; `Mesh` holds the process groups. Meshes are
made once per shape and kept for the life of the process: DTensor caches them, so destroying or remaking one breaks
later steps (design.md section 6), and a run that grows to another mesh and back finds the first one again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from titan_growth.config.schema import Parallelism
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
    def num_ranks(self) -> int:
        """Ranks of the whole mesh."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    def __str__(self) -> str:
        named = [f"{axis} {degree}" for axis, degree in zip(AXES, self.degrees, strict=True) if degree > 1]
        return " x ".join(named) if named else "1 rank"


def resolve_mesh(section: Parallelism, num_ranks: int) -> tuple[MeshShape | None, list[Problem]]:
    """The mesh shape of a `[parallelism]` table on so many ranks, or what does not fit."""
    key = "parallelism.data_parallel_shard_degree"
    replicate, shard = section.data_parallel_replicate_degree, section.data_parallel_shard_degree
    if shard == 0:
        return None, [Problem(key, "must be -1 (all ranks that are left) or at least 1, got 0", "Leave it at -1")]
    if shard == -1:
        if num_ranks % replicate:
            message = f"{replicate} does not divide the {num_ranks} ranks"
            hint = "Set it to a divisor, or NGPU to a multiple"
            return None, [Problem("parallelism.data_parallel_replicate_degree", message, hint)]
        shard = num_ranks // replicate
    shape = MeshShape(dp_replicate=replicate, dp_shard=shard)
    if shape.num_ranks != num_ranks:
        there_are = "there is 1 rank" if num_ranks == 1 else f"there are {num_ranks} ranks"
        message = f"dp_replicate {replicate} x dp_shard {shard} = {shape.num_ranks}, but {there_are}"
        return None, [Problem(key, message, f"Set it to -1 to use all that are left, or NGPU to {shape.num_ranks}")]
    return shape, []


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

    @property
    def dp_rank(self) -> int:
        """This rank's place among those that see different sequences."""
        import torch.distributed as dist

        replicate = self.device_mesh.get_local_rank("dp_replicate")
        shard = self.device_mesh.get_local_rank("dp_shard")
        assert min(replicate, shard) >= 0, f"rank {dist.get_rank()} is not part of the mesh"
        return int(replicate * self.shape.dp_shard + shard)
