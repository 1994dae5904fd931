"""DCP's `.metadata`, parsed without executing it and checked in full before use.

    bytes -> inert records (pickles.py) -> one checking pass -> DCP's own classes

What passes is consistent: names are valid, pieces tile their tensor, each piece has its own bytes in a file of this
folder, and no number exceeds what it can count. Whether the files hold what the metadata says is checked on reading
(archive.py). What a load does not need, the planner's data, is dropped.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_growth.checkpoint.untrusted.archive import DTYPES
from titan_growth.checkpoint.untrusted.files import is_count, is_plain_name
from titan_growth.checkpoint.untrusted.pickles import Record, RefusedError, Symbol, read_pickle
from titan_growth.checkpoint.untrusted.tiling import gap
from titan_growth.tools.torch_private import StorageInfo

MAX_NAME = 1000
MAX_DIMS = 32
_LIMIT = 1 << 63

SizeOf = Callable[[str], int | None]
"""File name -> its size, or None if it is missing. Raises RefusedError if it must not be read."""


def parse_metadata(data: bytes, size_of: SizeOf) -> Metadata:
    """Parses a checkpoint's DCP metadata.

    Args:
        size_of: looks up the files it names.

    Raises:
        RefusedError: if it is anything else, or contradicts itself or the files.
    """
    collects = gc.isenabled()
    gc.disable()  # it would scan a million small live objects again and again
    try:
        return _Conversion(size_of).metadata(read_pickle(data, _find))
    finally:
        if collects:
            gc.enable()


# ---- admitted globals ------------------------------------------------------------------------------------------------


def _size(arguments: tuple[Any, ...]) -> Any:
    """`torch.Size(t)` is t; that t holds sizes is checked where it is used."""
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise RefusedError("makes a size of what is none")
    return arguments[0]


def _layout(arguments: tuple[Any, ...]) -> Any:
    if arguments != ("torch.strided",):
        raise RefusedError("describes a tensor that is not dense")
    return torch.strided


def _ignored(arguments: tuple[Any, ...]) -> None:
    """Not needed for a load: where the checkpoint was written, and the deprecated memory format."""


_MEMORY_FORMAT = Symbol("_MEM_FORMAT_ENCODING", _ignored)


def _memory_format_by_name(arguments: tuple[Any, ...]) -> None:
    """`getattr(_MEM_FORMAT_ENCODING, name)`: how Python 3.11.0 to 3.11.3 pickle an enum. No other one is admitted."""
    if len(arguments) != 2 or arguments[0] is not _MEMORY_FORMAT or type(arguments[1]) is not str:
        raise RefusedError("asks for builtins.getattr")


_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties")  # fmt: skip
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(_METADATA, name): Symbol(name, is_class=True) for name in _CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Symbol("_StorageInfo", is_class=True),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    ("builtins", "getattr"): Symbol("getattr", _memory_format_by_name),
    ("torch", "Size"): Symbol("Size", _size),
    ("torch.serialization", "_get_layout"): Symbol("_get_layout", _layout),
    **{(module, name): Symbol(name, _ignored) for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **DTYPES,
}
"""Every global that a `.metadata` may name."""


def _find(module: str, name: str) -> Any:
    if (module, name) not in _ADMITTED:
        raise RefusedError(f"asks for {module}.{name}")
    return _ADMITTED[module, name]


# ---- records to metadata ---------------------------------------------------------------------------------------------


class _Conversion:
    """One pass over the records. Each is consumed on first use: a pickle may refer to one a million times."""

    def __init__(self, size_of: SizeOf) -> None:
        self.size_of = size_of
        self.entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.boxes: dict[str, dict[torch.Size, torch.Size]] = {}
        """Tensor name -> offsets of each piece -> sizes of the piece."""
        self.file_sizes: dict[str, int | None] = {}
        self.tuples: dict[tuple[int, ...], torch.Size] = {}

    def metadata(self, record: Any) -> Metadata:
        table = _table(record, "Metadata")
        for name, entry in _dict(table, "state_dict_metadata").items():
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
                raise RefusedError(f"lists something under the name {_brief(name)}")
            self.entries[name] = self.entry(name, entry)
        storage: dict[MetadataIndex, StorageInfo] = {}
        for key, info in _dict(table, "storage_data").items():
            index = self.index(key)
            if index in storage:
                raise RefusedError(f"lists a piece of {_brief(index.fqn)} twice")
            storage[index] = self.info(index.fqn, info)
        for name, boxes in self.boxes.items():
            for offsets, sizes in boxes.items():
                if prod(sizes) and MetadataIndex(name, offsets) not in storage:
                    raise RefusedError(f"does not say where all of {_brief(name)} is stored")
        _require_apart(storage)
        version = table.get("version")
        return Metadata(self.entries, None, storage, StorageMeta(), version if isinstance(version, str) else None)

    def entry(self, name: str, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if type(record) is Record and record.kind == "BytesStorageMetadata":
            return BytesStorageMetadata()
        table = _table(record, "TensorStorageMetadata", name)
        size = self.sizes(table.get("size"), name)
        # The widest dtype has 16 bytes. Lengths beside a zero count too: strides are products of them.
        if prod(length or 1 for length in size) * 16 >= _LIMIT:
            raise RefusedError(f"says that {_brief(name)} has more values than there can be")
        properties = _properties(table.get("properties"), name)
        listed = table.pop("chunks", None)
        if type(listed) is not list:
            raise RefusedError(f"does not say which pieces {_brief(name)} has")
        boxes: dict[torch.Size, torch.Size] = {}
        for one in listed:
            offsets, sizes = self.chunk(name, size, one)
            # An empty piece may begin where another one does; the other one is stored there.
            before = boxes.setdefault(offsets, sizes)
            if not prod(before):
                boxes[offsets] = sizes
            elif prod(sizes) and before is not sizes:
                raise RefusedError(f"contradicts itself about {_brief(name)}: two pieces begin at one place")
        if wrong := gap(size, list(boxes.items())):
            raise RefusedError(f"contradicts itself: the pieces of {_brief(name)} do not make it up ({wrong})")
        self.boxes[name] = boxes
        return TensorStorageMetadata(properties, size, [ChunkStorageMetadata(*box) for box in boxes.items()])

    def chunk(self, name: str, size: torch.Size, record: Any) -> tuple[torch.Size, torch.Size]:
        """(offsets, sizes) of a piece."""
        table = _table(record, "ChunkStorageMetadata", name)
        offsets, sizes = self.sizes(table.get("offsets"), name), self.sizes(table.get("sizes"), name)
        if not len(offsets) == len(sizes) == len(size):
            raise RefusedError(f"lists a piece of {_brief(name)} with other dimensions")
        for offset, length, whole in zip(offsets, sizes, size, strict=True):
            if offset + length > whole:
                raise RefusedError(f"lists a piece outside {_brief(name)}")
        return offsets, sizes

    def index(self, record: Any) -> MetadataIndex:
        table = _table(record, "MetadataIndex")
        name, offset, hint = (table.get(key) for key in ("fqn", "offset", "index"))
        entry = self.entries.get(name) if isinstance(name, str) else None
        if not isinstance(name, str) or entry is None:
            raise RefusedError(f"says where {_brief(name)} is stored, but not what it is")
        if isinstance(entry, BytesStorageMetadata):
            return MetadataIndex(name)
        if hint is not None and not is_count(hint):
            raise RefusedError(f"lists a piece of {_brief(name)} as number {_brief(hint)}")
        # Without an offset: a tensor in one piece.
        offsets = torch.Size([0] * len(entry.size)) if offset is None else self.sizes(offset, name)
        if offsets not in self.boxes[name]:
            raise RefusedError(f"contradicts itself about {_brief(name)}: places a piece that it does not have")
        return MetadataIndex(name, offsets, hint)

    def info(self, name: str, record: Any) -> StorageInfo:
        table = _table(record, "_StorageInfo", name)
        file, begin, length = (table.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or (file not in self.file_sizes and not _is_shard_name(file)):
            raise RefusedError(f"names the file {_brief(file)}")
        if not is_count(begin) or not is_count(length):
            raise RefusedError(f"says that {_brief(name)} begins at {_brief(begin)} and has {_brief(length)} bytes")
        if table.get("transform_descriptors"):
            raise RefusedError(f"says that {_brief(name)} is stored compressed, or transformed otherwise")
        if file not in self.file_sizes:
            self.file_sizes[file] = self.size_of(file)
        there = self.file_sizes[file]
        if there is not None and begin + length > there:
            raise RefusedError(f"places {_brief(name)} beyond the end of {file}")
        return StorageInfo(file, begin, length)

    def sizes(self, value: Any, name: str) -> torch.Size:
        """A checked `torch.Size`, shared among equal ones. Items are checked before the tuple is hashed."""
        if type(value) is not tuple or len(value) > MAX_DIMS or not all(is_count(one) for one in value):
            raise RefusedError(f"holds no sizes where those of {_brief(name)} should be")
        found = self.tuples.get(value)
        if found is None:
            found = self.tuples[value] = torch.Size(value)
        return found


def _is_shard_name(name: str) -> bool:
    return is_plain_name(name) and not name.startswith(".")


_NUM_PROPERTIES = (5, 6)
"""PyTorch 2.15 added strides; like all after the layout they are of no use for a load, and are dropped."""


def _properties(record: Any, name: str) -> TensorProperties:
    state = record.state if type(record) is Record and record.kind == "TensorProperties" else None
    if type(state) is not tuple or len(state) not in _NUM_PROPERTIES or not isinstance(state[0], torch.dtype):
        raise RefusedError(f"does not say which type {_brief(name)} has")
    if state[1] is not torch.strided:
        raise RefusedError(f"says that {_brief(name)} is not dense")
    return TensorProperties(dtype=state[0])


def _table(record: Any, kind: str, name: str | None = None) -> dict[Any, Any]:
    """The attributes of a record of the given kind; consumes the record."""
    if type(record) is not Record or record.kind != kind or type(record.state) is not dict:
        raise RefusedError("holds no DCP metadata" if name is None else f"holds no DCP metadata about {_brief(name)}")
    table: dict[Any, Any] = record.state
    record.state = None
    return table


def _dict(table: Mapping[Any, Any], key: str) -> dict[Any, Any]:
    value = table.get(key)
    if type(value) is not dict:
        raise RefusedError(f"holds no DCP metadata (no {key})")
    return value


def _require_apart(storage: Mapping[MetadataIndex, StorageInfo]) -> None:
    """No two pieces share bytes; otherwise a small file could be read a million times over."""
    places = sorted((info.relative_path, info.offset, info.length, index.fqn) for index, info in storage.items())
    for (file, begin, length, name), (next_file, next_begin, _, next_name) in itertools.pairwise(places):
        if file == next_file and begin + length > next_begin:
            raise RefusedError(f"places {_brief(name)} and {_brief(next_name)} in the same bytes")


def _brief(value: Any) -> str:
    """A value for a message: text shortened, numbers as they are, only the type of anything else."""
    if isinstance(value, str):
        return value if len(value) <= 120 and value.isprintable() else repr(value[:100]) + "..."
    return str(value) if type(value) in (int, bool, type(None)) else f"a {type(value).__name__}"
