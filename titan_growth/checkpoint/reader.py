"""Reading DCP folders without executing anything in them, each stored chunk once.

DCP's own reader unpickles `.metadata`, which executes untrusted code, and loads tensors from archives that may ask for
any amount of memory. This one parses both as data (`checkpoint/untrusted/`) and reads values straight into place.

`names_of` maps a stored tensor to the names it is served under, so an embedding can also be read as its tied head.
One chunk may thus feed two tensors: requests are grouped by chunk, where DCP's reader would load it for each. Growth
plans its own reads (growth/read.py) from `chunks` and `read_chunk`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from titan_growth.checkpoint.untrusted.archive import StoredValues, find_values
from titan_growth.checkpoint.untrusted.files import MAX_METADATA_BYTES, open_plain, read_into, read_plain, size_of_file
from titan_growth.checkpoint.untrusted.metadata import parse_metadata
from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.liveness.waits import STORAGE, waiting_for
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError


@dataclass(frozen=True)
class StoredChunk:
    """A stored piece of a tensor: its box in the tensor, and where its bytes are."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    begin: int
    length: int

    @property
    def num_bytes(self) -> int:
        """Size of the values; the file has a little more."""
        return prod(self.sizes) * self.dtype.itemsize


NamesOf = Callable[[str], list[str]]
"""Stored name -> the names it is served under."""


class SafeReader(StorageReader):
    """A DCP storage reader for one step folder. The metadata is read once, on first use."""

    def __init__(self, path: Path, names_of: NamesOf | None = None) -> None:
        self.folder = path
        self.names_of = names_of
        self.num_bytes_read = 0
        """Stored bytes read so far by this rank."""
        self.num_chunks_read = 0
        self._stored: Metadata | None = None
        self._served: Metadata | None = None

    # ---- DCP's interface -----------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """No-op: a reader serves one folder."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """No-op: the metadata is this reader's own."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans, unchanged."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: DCP never picks this reader by path, it is always passed in."""
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's metadata, under the names of `names_of`.

        Raises:
            CheckpointError: if it is missing, damaged, inconsistent, or anything but metadata.
        """
        if self._served is None:
            stored = self._read_stored()
            self._served = stored if self.names_of is None else renamed(stored, self.names_of)
        return self._served

    def _read_stored(self) -> Metadata:
        if self._stored is None:
            with self._reading(".metadata", missing="it has no .metadata"):
                data = read_plain(self.folder / ".metadata", MAX_METADATA_BYTES)
            with self._reading(".metadata", refused="its metadata "):
                self._stored = parse_metadata(data, self._size_of)
        return self._stored

    def _size_of(self, name: str) -> int | None:
        with self._reading(name):
            return size_of_file(self.folder / name)

    def refused(self, reason: str) -> RefusedCheckpointError:
        """The error that refuses this folder."""
        return RefusedCheckpointError(self.folder.name, reason)

    @contextlib.contextmanager
    def _reading(self, file: str, *, missing: str = "", refused: str = "") -> Iterator[None]:
        """Makes an error of reading a file refuse the folder.

        Args:
            missing: the reason if there is no such file.
            refused: what the reason begins with if its content is not what it should be.
        """
        try:
            yield
        except OSError as error:
            reason = f"{file} cannot be read ({error.strerror or error})"
            raise self.refused(missing if missing and isinstance(error, FileNotFoundError) else reason) from None
        except RefusedError as error:
            raise self.refused(f"{refused}{error}") from None

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Serves all requests of this rank. What several of them share (tied weights) is read once."""
        served = self.read_metadata()
        sizes = _sizes_of_pieces(served, {item.storage_index.fqn for item in plan.items})
        per_chunk: dict[tuple[str, int, int], tuple[StoredChunk, list[ReadItem]]] = {}
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise CheckpointError(f"{item.storage_index.fqn} is not stored as a tensor")
            chunk = _stored_chunk(served, item.storage_index, sizes)
            per_chunk.setdefault((chunk.file, chunk.begin, chunk.length), (chunk, []))[1].append(item)
        for _, (chunk, items) in sorted(per_chunk.items(), key=lambda entry: entry[0]):
            for item, values in self._parts_of(chunk, items):
                target = planner.resolve_tensor(item).detach()
                target.copy_(values)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _parts_of(self, chunk: StoredChunk, items: list[ReadItem]) -> Iterator[tuple[ReadItem, torch.Tensor]]:
        """Each request of a stored chunk, with its values."""
        values = self.read_chunk(chunk)
        for item in items:
            part = values
            for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, size)
            yield item, part

    def chunks(self) -> dict[str, list[StoredChunk]]:
        """Name -> the pieces that tile the tensor. Raises CheckpointError if the metadata cannot be used."""
        metadata = self._read_stored()
        sizes = _sizes_of_pieces(metadata, metadata.state_dict_metadata)
        found: dict[str, list[StoredChunk]] = {}
        for index in metadata.storage_data:
            if index.fqn in sizes:
                found.setdefault(index.fqn, []).append(_stored_chunk(metadata, index, sizes))
        return found

    @waiting_for(STORAGE)
    def read_chunk(self, chunk: StoredChunk, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The values of a stored piece.

        Args:
            buffer: a byte tensor of at least `chunk.num_bytes` to read into; allocated by default.

        Raises:
            CheckpointError: if they cannot be read, or do not match the metadata.
        """
        with self._open(chunk) as file:
            values = self._find(file, chunk)
            buffer = torch.empty(chunk.num_bytes, dtype=torch.uint8) if buffer is None else buffer[: chunk.num_bytes]
            file.seek(chunk.begin + values.begin)
            self._fill(buffer, file, chunk)
        self.num_bytes_read += chunk.length
        self.num_chunks_read += 1
        flat = buffer.view(chunk.dtype)
        if values.is_contiguous:
            return flat.view(chunk.sizes)
        # Rare: the values are not stored in row-major order, which costs a copy.
        return flat.as_strided(values.size, values.stride).clone(memory_format=torch.contiguous_format)

    def values_in_parts(self, chunk: StoredChunk, max_bytes: int = 1 << 26) -> Iterator[torch.Tensor]:
        """All values of a stored piece, flat and in storage order, in parts of at most `max_bytes`."""
        with self._open(chunk) as file:
            values = self._find(file, chunk)
            file.seek(chunk.begin + values.begin)
            buffer = torch.empty(min(max_bytes, chunk.num_bytes), dtype=torch.uint8)
            for begin in range(0, chunk.num_bytes, max_bytes):
                part = buffer[: min(max_bytes, chunk.num_bytes - begin)]
                self._fill(part, file, chunk)
                yield part.view(chunk.dtype)

    def _fill(self, buffer: torch.Tensor, file: IO[bytes], chunk: StoredChunk) -> None:
        with self._reading(chunk.file):
            complete = read_into(file, buffer.numpy())
        if not complete:
            raise self.refused(f"{chunk.file} ends too early")

    @waiting_for(STORAGE)
    def check_chunks(self, chunks: Iterable[StoredChunk]) -> None:
        """Raises CheckpointError unless the files hold the pieces as the metadata says; reads no values."""
        for chunk in chunks:
            with self._open(chunk) as file:
                self._find(file, chunk)

    def _open(self, chunk: StoredChunk) -> IO[bytes]:
        with self._reading(chunk.file, missing=f"{chunk.file} is missing"):
            return open_plain(self.folder / chunk.file)

    def _find(self, file: IO[bytes], chunk: StoredChunk) -> StoredValues:
        """Locates the values of a piece and checks them against the metadata."""
        with self._reading(chunk.file, refused=f"{chunk.file}, where {chunk.name} should be, "):
            found = find_values(file, chunk.begin, chunk.length)
        if found.size != tuple(chunk.sizes) or found.dtype != chunk.dtype:
            raise self.refused(f"{chunk.file} does not hold {chunk.name} as the metadata says")
        return found

    def tensor_entries(self) -> dict[str, TensorStorageMetadata]:
        """Name -> size and dtype of every stored tensor, under the names of `names_of`; no byte entries."""
        entries = self.read_metadata().state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


_Sizes = dict[str, dict[tuple[int, ...], tuple[int, ...]]]
"""Tensor name -> offsets of each piece -> sizes of the piece."""


def _sizes_of_pieces(metadata: Metadata, names: Iterable[str]) -> _Sizes:
    found: _Sizes = {}
    for name in names:
        entry = metadata.state_dict_metadata.get(name)
        if isinstance(entry, TensorStorageMetadata):
            found[name] = {tuple(piece.offsets): tuple(piece.sizes) for piece in entry.chunks}
    return found


def _stored_chunk(metadata: Metadata, index: MetadataIndex, sizes: _Sizes) -> StoredChunk:
    entry, info = metadata.state_dict_metadata[index.fqn], metadata.storage_data[index]
    assert isinstance(entry, TensorStorageMetadata)
    assert index.offset is not None
    offsets = tuple(index.offset)
    where = (info.relative_path, info.offset, info.length)
    return StoredChunk(index.fqn, offsets, sizes[index.fqn][offsets], entry.properties.dtype, *where)


def misplaced(path: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a folder's metadata or the pieces it lists, or None.

    Args:
        share: (rank, number of ranks); each rank checks its share of the pieces.
    """
    try:
        reader = SafeReader(path)
        pieces = [piece for found in reader.chunks().values() for piece in found]
        pieces.sort(key=lambda piece: (piece.file, piece.begin))
        reader.check_chunks(pieces[share[0] :: share[1]])
    except CheckpointError as error:
        return error.reason
    return None


def renamed(metadata: Metadata, names_of: NamesOf) -> Metadata:
    """The same data listed under other names; a stored tensor may appear under none, one or several."""
    entries = {new: entry for name, entry in metadata.state_dict_metadata.items() for new in names_of(name)}
    storage = {
        MetadataIndex(new, index.offset, index.index): info
        for index, info in (metadata.storage_data or {}).items()
        for new in names_of(index.fqn)
    }
    return dataclasses.replace(metadata, state_dict_metadata=entries, storage_data=storage, planner_data=None)
