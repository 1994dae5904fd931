"""Reading DCP folders: nothing stored in them is run, and each stored chunk is read once.

DCP's own reader unpickles `.metadata`, which runs whatever a stranger put there. This one admits only the few classes
that DCP's metadata is made of. It also takes `names_of`, a function that says under which names a stored tensor should
appear: with it an embedding is read as the head that is tied to it, too. Since one stored chunk may so feed two
tensors, requests are grouped by chunk; DCP's reader would load it again for each. Growth plans its own read
(growth/read.py), from `chunks` and `read_chunk`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from titan_growth.tools.errors import CheckpointError


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
        """Of its values; the file has a little more."""
        return prod(self.sizes) * self.dtype.itemsize


NamesOf = Callable[[str], list[str]]
"""Stored name -> the names it is served under."""

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return pathlib.PurePosixPath
        raise pickle.UnpicklingError(f"its metadata asks for {module}.{name}")


class SafeReader(FileSystemReader):
    """A DCP storage reader for one step folder."""

    def __init__(self, path: Path, names_of: NamesOf | None = None) -> None:
        super().__init__(str(path))  # for the parts of it that are not used here
        self.folder = path
        self.names_of = names_of
        self.num_bytes_read = 0
        """Stored bytes read so far by this rank."""
        self.num_chunks_read = 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's metadata, under the names that `names_of` gives.

        Raises:
            CheckpointError: when it is missing, damaged, or holds anything but metadata.
        """
        try:
            with (self.folder / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder.name} refused: it has no .metadata") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise CheckpointError(f"{self.folder.name} refused: {error}") from None
        if not _is_metadata(metadata):
            raise CheckpointError(f"{self.folder.name} refused: .metadata holds no DCP metadata")
        for info in metadata.storage_data.values():
            if "/" in info.relative_path or "\\" in info.relative_path or info.relative_path.startswith("."):
                raise CheckpointError(f"{self.folder.name} refused: it names the file {info.relative_path!r}")
        storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        storage_meta.load_id = self.load_id
        metadata.storage_meta = storage_meta
        return metadata if self.names_of is None else renamed(metadata, self.names_of)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Serves all requests of this rank, reading each stored chunk once."""
        per_chunk: dict[tuple[str, int, int], list[ReadItem]] = {}
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise CheckpointError(f"{item.storage_index.fqn} is not stored as a tensor")
            info = self.storage_data[item.storage_index]
            per_chunk.setdefault((info.relative_path, info.offset, info.length), []).append(item)
        for (relative_path, offset, length), items in sorted(per_chunk.items(), key=lambda entry: entry[0]):
            chunk = self._read(relative_path, offset, length)
            for item in items:
                values = chunk
                for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    values = values.narrow(dim, start, size)
                target = planner.resolve_tensor(item).detach()
                target.copy_(values)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def chunks(self) -> dict[str, list[StoredChunk]]:
        """Name -> the pieces that a tensor is stored in.

        Raises:
            CheckpointError: when the pieces of a tensor do not make it up.
        """
        metadata = self.read_metadata()
        found: dict[str, list[StoredChunk]] = {}
        boxes: dict[str, dict[tuple[int, ...], set[tuple[int, ...]]]] = {}  # name -> offsets -> sizes
        for name, tensor in metadata.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata):
                boxes[name] = {}
                for listed in tensor.chunks:
                    boxes[name].setdefault(tuple(listed.offsets), set()).add(tuple(listed.sizes))
        for index, info in metadata.storage_data.items():
            entry = metadata.state_dict_metadata.get(index.fqn)
            if not isinstance(entry, TensorStorageMetadata):
                continue
            offsets = tuple(index.offset) if index.offset is not None else (0,) * len(entry.size)
            sizes = boxes[index.fqn].get(offsets, set())
            sizes = {size for size in sizes if prod(size)} or sizes  # an empty shard begins where another one does
            if len(sizes) != 1:
                raise CheckpointError(f"{self.folder.name} refused: its metadata contradicts itself about {index.fqn}")
            where = (info.relative_path, info.offset, info.length)
            found.setdefault(index.fqn, []).append(
                StoredChunk(index.fqn, offsets, sizes.pop(), entry.properties.dtype, *where)
            )
        for name, pieces in found.items():
            entry = metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            if sum(prod(piece.sizes) for piece in pieces) != entry.size.numel():
                raise CheckpointError(f"{self.folder.name} refused: the pieces of {name} do not make it up")
        return found

    def read_chunk(self, chunk: StoredChunk, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The values of a stored piece.

        Args:
            buffer: where to put them: bytes, at least as many as the piece has values. Default: memory of their own.

        Raises:
            CheckpointError: when they cannot be read, or are not what the metadata says.
        """
        where = f"{self.folder.name}/{chunk.file}"
        with (self.folder / chunk.file).open("rb") as file:
            # What the archive says it holds, without the values; these are then read into their place. torch.load would
            # hold them up to three times on the way.
            said = _load_tensor(_create_file_view(file, chunk.begin, chunk.length), where, "meta")
            as_listed = tuple(said.shape) == chunk.sizes and said.dtype == chunk.dtype and said.is_contiguous()
            num_bytes = chunk.num_bytes
            storage_begin = said.untyped_storage()._checkpoint_offset
            if storage_begin is None:
                raise CheckpointError(f"{self.folder.name} refused: {chunk.name} is stored as a {type(said).__name__}")
            begin = storage_begin + int(said.storage_offset()) * said.element_size()
            if not as_listed or begin + num_bytes > chunk.length:
                raise CheckpointError(f"{self.folder.name} refused: {chunk.file} does not hold {chunk.name} as it says")
            buffer = torch.empty(num_bytes, dtype=torch.uint8) if buffer is None else buffer[:num_bytes]
            target: Any = buffer.numpy()
            file.seek(chunk.begin + begin)
            if num_bytes and file.readinto(target) != num_bytes:
                raise CheckpointError(f"{where} cannot be read (it ends too early)")
        self.num_bytes_read += chunk.length
        self.num_chunks_read += 1
        return buffer.view(chunk.dtype).view(chunk.sizes)

    def _read(self, relative_path: str, offset: int, length: int) -> torch.Tensor:
        with (self.folder / relative_path).open("rb") as file:
            # A view of the file, not its bytes: values go from the disk into the tensor without a copy between.
            values = _load_tensor(_create_file_view(file, offset, length), f"{self.folder.name}/{relative_path}")
        self.num_bytes_read += length
        self.num_chunks_read += 1
        return values

    def tensor_entries(self) -> dict[str, TensorStorageMetadata]:
        """Name -> size and dtype of every stored tensor, under the names of `names_of`."""
        entries = self.read_metadata().state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _is_metadata(metadata: Any) -> bool:
    if not isinstance(metadata, Metadata):
        return False
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        return False
    return all(
        isinstance(index, MetadataIndex) and isinstance(getattr(info, "relative_path", None), str)
        for index, info in storage.items()
    )


def _load_tensor(file: Any, where: str, device: str = "cpu") -> torch.Tensor:
    try:
        value = torch.load(file, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise CheckpointError(f"{where} cannot be read ({type(error).__name__})") from None
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{where} holds a {type(value).__name__} where a tensor should be")
    return value


def renamed(metadata: Metadata, names_of: NamesOf) -> Metadata:
    """The same stored data listed under other names; one stored tensor may appear under none, one or many."""
    entries = {new: entry for name, entry in metadata.state_dict_metadata.items() for new in names_of(name)}
    storage = {
        MetadataIndex(new, index.offset, index.index): info
        for index, info in (metadata.storage_data or {}).items()
        for new in names_of(index.fqn)
    }
    return dataclasses.replace(metadata, state_dict_metadata=entries, storage_data=storage, planner_data=None)
