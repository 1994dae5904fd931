"""Locates the values of a tensor in an archive written by `torch.save`.

`torch.load(weights_only=True)` runs no code of the archive, but allocates what the archive asks for: compressed records
that expand a thousandfold, `bytearray(10**11)` in the pickle, a terabyte from one value with zero strides. So nothing
is loaded. The archive's directory and pickle, a few hundred bytes each, are parsed as data (pickles.py) and must
describe one dense tensor stored uncompressed. Its values are then read straight into place, and never more bytes than
metadata, archive and file all agree on.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import torch

from titan_growth.checkpoint.untrusted.files import is_count
from titan_growth.checkpoint.untrusted.pickles import RefusedError, Symbol, read_pickle

MAX_DIRECTORY_BYTES = 1 << 17
"""Limit on reads of an archive's directory and of its pickle, which have about 500 and 200 bytes."""


@dataclass(frozen=True)
class StoredValues:
    """Where and how a tensor's values are stored in a file."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    """In values. Dense: each value is stored once, not necessarily in row-major order."""
    begin: int
    """Of the values, in bytes from the start of the archive."""

    @property
    def num_bytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the values are in row-major order."""
        expected = 1
        for length, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if length != 1 and stride != expected:
                return not prod(self.size)
            expected *= length
        return True


def find_values(file: IO[bytes], begin: int, length: int) -> StoredValues:
    """The tensor in `file[begin : begin + length]`, which must be an archive of one dense tensor.

    Raises:
        RefusedError: if it is anything else.
        OSError: if the file cannot be read.
    """
    window = _Window(file, begin, length)
    try:
        with zipfile.ZipFile(window) as archive:
            records = archive.infolist()
    except (OSError, RefusedError):
        raise
    except Exception as error:  # a damaged archive can raise almost anything
        raise RefusedError(f"is no archive of a tensor ({type(error).__name__})") from None
    by_name = {record.filename: record for record in records}
    if len(by_name) != len(records):
        raise RefusedError("is an archive with two records of one name")
    if any(
        record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size for record in records
    ):
        raise RefusedError("is an archive with compressed records")
    pickles = [name for name in by_name if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RefusedError("is no archive of a tensor (it has no data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    if (order := by_name.get(prefix + "byteorder")) and window.content(order) != sys.byteorder.encode():
        raise RefusedError("was written by a machine with another byte order")
    tensor = read_pickle(window.content(by_name[pickles[0]]), _find, _storage)
    if type(tensor) is not _Tensor:
        raise RefusedError(f"holds a {type(tensor).__name__} where a tensor should be")
    record = by_name.get(f"{prefix}data/{tensor.storage.key}")
    if record is None or record.file_size < tensor.storage.num_bytes:
        raise RefusedError("is an archive without the values")
    skipped = tensor.offset * tensor.dtype.itemsize
    return StoredValues(tensor.dtype, tensor.size, tensor.stride, window.begin_of(record) + skipped)


class _Window(io.RawIOBase):
    """A part of a file as a file, with a limit on the size of a read."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._position = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self._position, self._length)[whence]
        if not 0 <= position <= self._length:
            raise RefusedError("is an archive that points outside itself")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        left = self._length - self._position
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_DIRECTORY_BYTES:
            raise RefusedError("is no archive of a tensor (its directory is too large)")
        self._file.seek(self._begin + self._position)
        data = self._file.read(wanted)
        self._position += len(data)
        return data

    def begin_of(self, record: zipfile.ZipInfo) -> int:
        """Where the content of a record begins in the window."""
        self.seek(record.header_offset)
        header = self.read(30)
        if len(header) != 30 or header[:4] != b"PK\3\4":
            raise RefusedError("is an archive with a damaged record")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        begin: int = record.header_offset + 30 + name_length + extra_length
        if begin + record.file_size > self._length:
            raise RefusedError("is an archive that points outside itself")
        return begin

    def content(self, record: zipfile.ZipInfo) -> bytes:
        """The content of a small record. Its CRC is not checked: archives may be written without."""
        self.seek(self.begin_of(record))
        return self.read(record.file_size)


# ---- the pickle of a tensor ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype | None
    """None if untyped; the tensor then has its own dtype."""
    length: int

    @property
    def num_bytes(self) -> int:
        return self.length * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _storage(description: Any) -> _Storage:
    """Resolves a persistent id: ("storage", type, key, device, number of elements)."""
    if type(description) is not tuple or len(description) != 5 or type(description[1]) is not _StorageType:
        raise RefusedError("refers to something outside that is no storage")
    _, kind, key, _, length = description
    if not isinstance(key, str) or not key.isalnum() or len(key) > 20 or not is_count(length):
        raise RefusedError("refers to a storage that cannot be")
    return _Storage(key, kind.dtype, length)


def _rebuilt(arguments: tuple[Any, ...]) -> _Tensor:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`."""
    if len(arguments) not in (6, 7):
        raise RefusedError("describes no tensor")
    storage, offset, size, stride, _, hooks, *metadata = arguments
    return _checked(
        storage, offset, size, stride, hooks, metadata, storage.dtype if type(storage) is _Storage else None
    )


def _rebuilt_untyped(arguments: tuple[Any, ...]) -> _Tensor:
    """`_rebuild_tensor_v3`, for dtypes without a typed storage: as above, with the dtype before the metadata."""
    if len(arguments) not in (7, 8):
        raise RefusedError("describes no tensor")
    storage, offset, size, stride, _, hooks, dtype, *metadata = arguments
    return _checked(storage, offset, size, stride, hooks, metadata, dtype)


def _checked(storage: Any, offset: Any, size: Any, stride: Any, hooks: Any, metadata: list[Any], dtype: Any) -> _Tensor:
    counts = all(type(one) is tuple and len(one) <= 64 and all(map(is_count, one)) for one in (size, stride))
    if type(storage) is not _Storage or not is_count(offset) or not counts or not isinstance(dtype, torch.dtype):
        raise RefusedError("describes no tensor")
    if hooks is not _NOTHING or any(one not in (None, _NOTHING) for one in metadata):
        raise RefusedError("describes a tensor with hooks or other additions")
    if len(size) != len(stride):
        raise RefusedError("describes no tensor")
    num_values = prod(size)
    # Every value must be stored once: no zero strides that repeat a value, no gaps.
    if num_values and not _is_dense(size, stride):
        raise RefusedError("describes a tensor whose values do not lie side by side")
    if (offset + num_values) * dtype.itemsize > storage.num_bytes:
        raise RefusedError("describes a tensor of more values than it stores")
    return _Tensor(storage, offset, size, stride, dtype)


def _is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for step, length in sorted((step, length) for step, length in zip(stride, size, strict=True) if length != 1):
        if step != expected:
            return False
        expected *= length
    return True


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None


class _Nothing:
    """An empty `OrderedDict`."""


_NOTHING = _Nothing()


def _nothing(arguments: tuple[Any, ...]) -> _Nothing:
    if arguments:
        raise RefusedError("describes a tensor with hooks or other additions")
    return _NOTHING


def _parameter(arguments: tuple[Any, ...]) -> Any:
    """`_rebuild_parameter(tensor, requires_grad, hooks)`."""
    if len(arguments) != 3 or type(arguments[0]) is not _Tensor or arguments[2] is not _NOTHING:
        raise RefusedError("describes no tensor")
    return arguments[0]


DTYPES = {
    ("torch", name): value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not str(value).startswith(("torch.qint", "torch.quint"))
}
"""The dtypes admitted, as pickles name them. Quantised ones carry scales, which are not values."""
_TYPED = {
    "BFloat16": torch.bfloat16, "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Double": torch.float64,
    "Float": torch.float32, "Half": torch.float16, "Int": torch.int32, "Long": torch.int64, "Short": torch.int16,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_ADMITTED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Symbol("_rebuild_tensor_v2", _rebuilt),
    ("torch._utils", "_rebuild_tensor_v3"): Symbol("_rebuild_tensor_v3", _rebuilt_untyped),
    ("torch._utils", "_rebuild_parameter"): Symbol("_rebuild_parameter", _parameter),
    ("collections", "OrderedDict"): Symbol("OrderedDict", _nothing),
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    **{("torch", f"{name}Storage"): _StorageType(dtype) for name, dtype in _TYPED.items()},
    **DTYPES,
}
"""Every global that a tensor's pickle may name."""


def _find(module: str, name: str) -> Any:
    if (module, name) not in _ADMITTED:
        raise RefusedError(f"asks for {module}.{name}")
    return _ADMITTED[module, name]
