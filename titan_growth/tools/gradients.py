"""Gradients sharded like their parameters."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def reduced(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the placements of its parameter, summed over ranks where it is partial.

    With FSDP there is nothing to do. Without it, a norm's gradient under sequence parallelism is partial, and a sharded
    embedding's arrives unsharded.
    """
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return gradient
    return gradient.redistribute(placements=parameter.placements)
