"""The process groups of a mesh.

A mesh is made once per shape and lives as long as the process. DTensor caches meshes, so destroying or remaking one
breaks later steps; a run that grows to another mesh and back gets the first one again.
"""

from __future__ import annotations

from functools import cached_property

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_growth.layout.mesh_shape import AXES, MeshShape
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.torch_private import concatenated, flattened


class Mesh:
    """A mesh shape with its process groups, seen from this rank."""

    _cache: dict[tuple[str, MeshShape], Mesh] = {}

    def __init__(self, shape: MeshShape, device_type: str) -> None:
        self.shape = shape
        self.device_type = device_type

    @classmethod
    def get(cls, shape: MeshShape, device_type: str) -> Mesh:
        """This process's mesh of this shape.

        Raises:
            ConfigError: if the shape does not fit the number of ranks.
        """
        if shape.num_ranks != dist.get_world_size():
            raise ConfigError(f"mesh {shape} needs {shape.num_ranks} ranks, but there are {dist.get_world_size()}")
        return cls._cache.setdefault((device_type, shape), cls(shape, device_type))

    @cached_property
    def device_mesh(self) -> DeviceMesh:
        """The full five-axis `DeviceMesh`; axes of degree 1 are kept, so slicing by name always works."""
        return init_device_mesh(self.device_type, self.shape.degrees, mesh_dim_names=AXES)

    def rank_of(self, axis: str) -> int:
        """This rank's coordinate on an axis."""
        coordinate = self.device_mesh.get_local_rank(axis)
        assert coordinate >= 0, "this rank is not part of the mesh"
        return int(coordinate)

    def group_of(self, axis: str) -> ProcessGroup:
        """The process group of an axis."""
        return self.device_mesh.get_group(axis)

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh for `fully_shard`: `dp_shard` and `cp` flattened, after `dp_replicate` if there are replicas."""
        sharded = self.device_mesh["dp_shard"]
        if self.shape.cp > 1:
            sharded = flattened(self.device_mesh["dp_shard", "cp"], "fsdp")
        return sharded if self.shape.dp_replicate == 1 else concatenated([self.device_mesh["dp_replicate"], sharded])

    @cached_property
    def part_group(self) -> ProcessGroup | None:
        """The ranks with shards of the same pipeline parts as this one; None where it is alone.

        Asked for the first time, the group is made: all ranks must ask together.
        """
        if self.shape.num_ranks == self.shape.pp:
            return None
        if self.shape.pp == 1:
            return dist.group.WORLD
        return flattened(self.device_mesh["dp_replicate", "dp_shard", "cp", "tp"], "part").get_group()

    @property
    def dp_rank(self) -> int:
        """This rank's index among those that see different sequences."""
        return self.rank_of("dp_replicate") * self.shape.dp_shard + self.rank_of("dp_shard")

    @property
    def speaks_for_its_data(self) -> bool:
        """True on exactly one of the ranks that see the same sequences, so that each is counted once."""
        return all(self.rank_of(axis) == 0 for axis in ("pp", "cp", "tp"))
