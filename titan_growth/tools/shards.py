"""This rank's part of a tensor that may be sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_growth.tools.torch_private import is_traceable_wrapper_subclass

_values_of: dict[type, str] = {}
"""Wrapper -> its attribute with the values. Asked once: with a scale, torchao's answer waits for the device."""


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
    kind = type(local)
    if kind not in _values_of:
        _values_of[kind] = local.__tensor_flatten__()[0][0]  # its scale may come second
    values: Tensor = getattr(local, _values_of[kind])
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
