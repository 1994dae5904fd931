"""The copy of a run's tensors that a background save writes, while training changes the tensors themselves.

Each rank copies its own shards into memory of the host that is kept from save to save. On CUDA that memory can be
page-locked: the copies are then only queued, behind the step that made the values and before the one that changes them,
and it is the background that waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor


class HostCopies:
    """Host memory for the shards of a rank, used for one save at a time.

    Args:
        pinned: page-locked memory; needs CUDA.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.local: dict[str, Tensor] = {}
        """Name -> the copy of this rank's shard."""
        self._event: Any = None

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copies the shards; on CUDA with page-locked memory it returns before they have arrived."""
        before, self.local = self.local, {}
        for name, tensor in tensors.items():
            shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            room = before.get(name)
            if room is None or room.shape != shard.shape or room.dtype != shard.dtype:
                room = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=self.pinned)
            self.local[name] = room.copy_(shard, non_blocking=self.pinned)
        if self.pinned:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Returns when the copies have arrived."""
        if self._event is not None:
            self._event.synchronize()


class StagedPlanner(DefaultSavePlanner):
    """A DCP save plan made from the tensors in use, of which only the shapes are looked at, and written from copies."""

    def __init__(self, copies: HostCopies) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy of the shard that DCP is about to write; a rank has one of each tensor."""
        return self.copies.local[index.fqn]
