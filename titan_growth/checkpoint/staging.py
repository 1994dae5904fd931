"""Host copies of the tensors, for a background save to write while training goes on.

Each rank copies its shards into host memory that is reused from save to save. On CUDA the memory can be pinned: copies
are then only queued, after the step that made the values and before the next, and the background thread waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from titan_growth.tools.shards import local_of


class HostCopies:
    """Host memory for the shards of a rank, used for one save at a time.

    Args:
        pinned: use page-locked memory; needs CUDA.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.local: dict[str, Tensor] = {}
        """Name -> the copy of this rank's shard."""
        self._event: Any = None

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copies the shards; with pinned memory it returns before the copies have completed."""
        buffers, self.local = self.local, {}
        for name, tensor in tensors.items():
            shard = local_of(tensor)
            buffer = buffers.get(name)
            if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
                buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=self.pinned)
            self.local[name] = buffer.copy_(shard, non_blocking=self.pinned)
        if self.pinned:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Waits for the copies to complete."""
        if self._event is not None:
            self._event.synchronize()


class StagedPlanner(DefaultSavePlanner):
    """Plans from the live tensors, of which only shapes are read, and writes their host copies."""

    def __init__(self, copies: HostCopies) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy of the shard DCP is about to write; a rank has one shard of each tensor."""
        return self.copies.local[index.fqn]
