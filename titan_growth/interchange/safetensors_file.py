"""safetensors files, read by byte range and written tensor by tensor.

    8 bytes    length of the header, little endian
    header     JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": strings
    data       the tensors' bytes, one after another, without gaps

The library reads whole tensors through a memory map and writes whole files from memory. Here a rank reads the byte
ranges of its shards into place, and a file is never held in memory. A header is trusted only if it fits its file: every
byte belongs to exactly one tensor, and each tensor has as many as its shape needs.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from titan_growth.checkpoint.untrusted.files import read_into
from titan_growth.tools.errors import RefusedCheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The library's limit."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_SIZE = 2**62
_COMPARED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Of its values, in bytes from the beginning of the file."""
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        RefusedCheckpointError: if the header is damaged or does not fit the file.
        OSError: if the file cannot be read.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, num_bytes - 8):
            raise _refused(path, f"a header of {length:,} bytes in a file of {num_bytes:,}")
        table = parse_json(file.read(length), path.parent.name, f"the header of {path.name}")
    table.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in table.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda one: (one.begin, one.num_bytes)):
        if tensor.begin != end:
            what = "overlaps another tensor" if tensor.begin < end else "leaves a gap before it"
            raise _refused(path, f"{tensor.name!a:.100} {what}")
        end += tensor.num_bytes
    if end != num_bytes:
        raise _refused(path, f"its tensors end at byte {end:,} and the file at {num_bytes:,}")
    return tensors


def _tensor(path: Path, name: str, entry: Any, data_begin: int) -> StoredTensor:
    def refused(why: str) -> RefusedCheckpointError:
        return _refused(path, f"{name!a:.100} {why}")

    if not isinstance(entry, dict):
        raise refused("has no entry")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise refused(f"has the unknown dtype {dtype!a:.40}")
    if not (_are_sizes(shape) and _are_sizes(offsets)):
        raise refused("has an invalid shape or invalid offsets")
    assert shape is not None
    assert offsets is not None
    if len(offsets) != 2 or len(shape) > 8 or offsets[1] - offsets[0] != prod(shape) * _DTYPES[dtype].itemsize:
        raise refused(f"has the shape {shape!s:.100} but the offsets {offsets!s:.100}, which do not fit")
    return StoredTensor(name, path.name, _DTYPES[dtype], tuple(shape), data_begin + offsets[0], offsets[1] - offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _MAX_SIZE for size in value)


def _refused(path: Path, why: str) -> RefusedCheckpointError:
    return RefusedCheckpointError(path.parent.name, f"{path.name} is not a valid safetensors file ({why})")


def parse_json(data: bytes, folder: str, what: str) -> dict[str, Any]:
    """Parses a JSON object without duplicate keys. If it is not one, refuses the folder; `what` names it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("it names a key twice")
        return table

    try:
        table = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:100]
        raise RefusedCheckpointError(folder, f"{what} is not valid JSON ({why})") from None
    if not isinstance(table, dict):
        raise RefusedCheckpointError(folder, f"{what} is not a JSON object")
    return table


def fill(file: IO[bytes], offset: int, target: memoryview) -> None:
    """Reads bytes at an offset of a file into memory. Raises OSError if the file ends first."""
    file.seek(offset)
    if not read_into(file, target):
        raise OSError(5, "the file ends too early", getattr(file, "name", None))


def have_equal_values(folder: Path, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of a folder have the same type, shape and bytes. Raises OSError if one cannot be read."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with (folder / one.file).open("rb") as file, (folder / other.file).open("rb") as other_file:
        file.seek(one.begin)
        other_file.seek(other.begin)
        for first in range(0, one.num_bytes, _COMPARED_BYTES):
            num_bytes = min(_COMPARED_BYTES, one.num_bytes - first)
            if file.read(num_bytes) != other_file.read(num_bytes):
                return False
    return True


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def write_file(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], make: Callable[[str], Tensor]
) -> None:
    """Writes a file, one tensor after another.

    Args:
        shapes: name -> (dtype, shape) of every tensor.
        make: called per name in file order; its result is written and released.

    Raises:
        OSError: if it cannot be written. The incomplete file is not a valid one.
    """
    # Widest dtypes first: every tensor is then aligned to its item size, as the format requires.
    order = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = shapes[name]
        num_bytes = prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == shapes[name], f"{name} does not match `shapes`"
            file.write(memory_of(tensor.contiguous()))
        file.flush()
        os.fsync(file.fileno())


def total_bytes(shapes: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Size of the values of all tensors."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in shapes)
