"""This rank's part of a tensor that may be sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_of(tensor: Tensor) -> Tensor:
    """The shard of a DTensor, or the whole plain tensor; the same memory, and part of the graph."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
