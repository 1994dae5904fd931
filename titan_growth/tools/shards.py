"""This rank's part of a tensor that may be sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_growth.tools.torch_private import is_traceable_wrapper_subclass


def local_of(tensor: Tensor) -> Tensor:
    """The shard of a DTensor, or the whole plain tensor; the same memory, and part of the graph."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain(tensor: Tensor) -> Tensor:
    """The same memory without torchao's wrapper for Float8 all-gathers.

    Checkpoints hold plain tensors, which any program can read without torchao.
    """
    local = local_of(tensor)
    if not is_traceable_wrapper_subclass(local):
        return tensor
    (name,), _ = local.__tensor_flatten__()
    values: Tensor = getattr(local, name)
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
