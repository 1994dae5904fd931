"""Gradients laid out like their parameters."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def reduced(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the placements of its parameter; summed over ranks where it is still each rank's own share.

    FSDP leaves nothing to do. Without it the gradient of a norm under sequence parallelism is each rank's sum over its
    piece of the sequence, and that of a split embedding arrives whole.
    """
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return gradient
    return gradient.redistribute(placements=parameter.placements)
