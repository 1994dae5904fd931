"""Tensors as bits: equal only if every one is, NaN and the sign of zero included."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Whether any bit does; a boolean scalar on their device."""
    return (bits_of(one) != bits_of(other)).any()


def fingerprint(tensor: Tensor) -> Tensor:
    """One 64-bit number that another value of any one element changes; on the tensor's device."""
    return bits_of(tensor).sum(dtype=torch.int64)
