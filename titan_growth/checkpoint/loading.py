"""Loading a DCP folder on all ranks: check that every tensor is there with the right size and dtype, read in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.saving import cause_of, root_cause
from titan_growth.tools.collectives import fail_together
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError


def load(reader: SafeReader, tensors: Mapping[str, Tensor], *, casts: bool = False) -> None:
    """Fills the given tensors, plain or sharded. Each rank reads only the stored chunks that its shards overlap.

    Args:
        casts: accept another floating-point dtype.

    Raises:
        CheckpointError: on every rank, if a tensor is missing or does not fit, or a file cannot be read.
    """
    fail_together(misfits(reader, tensors, casts=casts), CheckpointError)
    errors: list[str] = []
    try:
        dcp.load(dict(tensors), storage_reader=reader)
    except (Exception, CheckpointException) as error:  # DCP wraps the errors of all ranks
        cause = cause_of(error, OSError, CheckpointError)
        known = isinstance(cause, RefusedCheckpointError)
        errors = [str(cause if known else reader.refused(root_cause(error)))]
    fail_together(errors, CheckpointError)


def misfits(reader: SafeReader, tensors: Mapping[str, Tensor], *, casts: bool = False) -> list[str]:
    """A message naming the first stored tensors that do not match, or nothing."""
    try:
        stored = reader.tensor_entries()
    except CheckpointError as error:
        return [str(error)]
    wrong = []
    for name, tensor in tensors.items():
        if name not in stored:
            wrong.append(f"has no {name}")
        elif stored[name].size != tensor.shape:
            wrong.append(f"{name} is {_shape(stored[name].size)} there and {_shape(tensor.shape)} here")
        elif (dtype := stored[name].properties.dtype) != tensor.dtype and not (
            casts and dtype.is_floating_point and tensor.dtype.is_floating_point
        ):
            wrong.append(f"{name} is {dtype} there and {tensor.dtype} here")
    if not wrong:
        return []
    more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
    return [str(reader.refused(f"it is of another model: {'; '.join(wrong[:2])}{more}"))]


def _shape(size: torch.Size) -> str:
    return " x ".join(str(length) for length in size) or "a scalar"
