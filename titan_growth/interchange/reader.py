"""Reads a Hugging Face folder through the interface of `SafeReader`, so that loads and growths take either.

Names, and the order of rows within each head, are converted to ours. Tensors are served in pieces of whole heads and at
most 64 MiB, which bounds host memory. A load reads exactly the rows and columns of a rank's shards, piece by piece and
straight into place; nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from titan_growth.checkpoint.reader import NamesOf, SafeReader, StoredChunk
from titan_growth.checkpoint.untrusted.archive import StoredValues
from titan_growth.interchange.folder import HuggingFaceFolder, open_folder
from titan_growth.interchange.safetensors_file import fill, memory_of
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.torch_private import StorageInfo

PIECE_BYTES = 64 * 2**20
"""Size of a piece, unless one head is larger."""

_MUST_AGREE = {"num_heads": "n_heads", "num_kv_heads": "n_kv_heads", "head_dim": "head_dim"}
"""What the shapes of the weights do not determine but their meaning depends on: field -> recipe key."""

_ONLY_SCALED = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len")
_MAY_DIFFER = ("norm_eps", "logit_softcap", "rope_theta", "rope_scaling_factor", *_ONLY_SCALED)


class HuggingFaceReader(SafeReader):
    """Opens and checks the folder on first use, and raises CheckpointError then if it is refused.

    Args:
        names_of: as in `SafeReader`.
        family, config: the model to load into. A folder of another model is refused.
    """

    def __init__(
        self,
        path: Path,
        names_of: NamesOf | None = None,
        *,
        family: str | None = None,
        config: DecoderConfig | None = None,
    ) -> None:
        super().__init__(path, names_of)
        self.family, self.config = family, config
        self._opened: HuggingFaceFolder | None = None

    @property
    def opened(self) -> HuggingFaceFolder:
        """The folder, checked."""
        if self._opened is None:
            opened = open_folder(self.folder)
            if self.family is not None and opened.section.name != self.family:
                raise self.refused(f"its family is {opened.section.name}, the recipe's is {self.family}")
            for field, key in _MUST_AGREE.items() if self.config is not None else ():
                stored, wanted = getattr(opened.config, field), getattr(self.config, field)
                if stored != wanted:
                    raise self.refused(f"it is of another model: {key} is {stored} there and {wanted} here")
            self._opened = opened
        return self._opened

    def differences(self) -> list[str]:
        """A line for each setting of the recipe that computes something else from the same weights."""
        if self.config is None:
            return []
        stored = self.opened.config
        return [
            f"model.{field} is {getattr(self.config, field)}, but {self.folder.name} was trained with "
            f"{getattr(stored, field)}"
            for field in _MAY_DIFFER
            if getattr(stored, field) != getattr(self.config, field)
            and not (self.config.rope_scaling_factor == stored.rope_scaling_factor == 1 and field in _ONLY_SCALED)
        ]

    # ---- DCP -----------------------------------------------------------------------------------------------------

    def _read_stored(self) -> Metadata:
        """The metadata of an equivalent DCP checkpoint."""
        if self._stored is None:
            entries: dict[str, Any] = {}
            storage: dict[MetadataIndex, Any] = {}
            for name, tensor in self.opened.tensors.items():
                row_bytes, group = tensor.num_bytes // tensor.shape[0], self._group_of(name) or 1
                step = max(1, PIECE_BYTES // (row_bytes * group)) * group
                chunks = []
                for first in range(0, tensor.shape[0], step):
                    num_rows = min(step, tensor.shape[0] - first)
                    offsets = torch.Size((first, *(0 for _ in tensor.shape[1:])))
                    chunks.append(ChunkStorageMetadata(offsets, torch.Size((num_rows, *tensor.shape[1:]))))
                    where = (tensor.begin + first * row_bytes, num_rows * row_bytes)
                    storage[MetadataIndex(name, offsets)] = StorageInfo(tensor.file, *where)
                properties = TensorProperties(dtype=tensor.dtype)
                entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            self._stored = Metadata(entries, storage_data=storage)
        return self._stored

    def _group_of(self, name: str) -> int | None:
        """Rows per head, if they have to be reordered."""
        return self.opened.layout.group_of(name, self.opened.config)

    def _parts_of(self, chunk: StoredChunk, items: list[ReadItem]) -> Iterator[tuple[ReadItem, Tensor]]:
        """As in `SafeReader`, but reads only what is requested of the chunk."""
        boxes: dict[Any, list[ReadItem]] = {}
        for item in items:
            boxes.setdefault((tuple(item.storage_offsets), tuple(item.lengths)), []).append(item)
        for (starts, lengths), same in sorted(boxes.items(), key=lambda entry: entry[0]):
            values = self._part(chunk, starts, lengths)
            yield from ((item, values) for item in same)

    def _part(self, chunk: StoredChunk, starts: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
        """A box of a chunk. Reads whole heads if rows are reordered, and only the columns of the box."""
        group = self._group_of(chunk.name)
        heads = group or 1
        first, stop = starts[0] // heads * heads, -(-(starts[0] + lengths[0]) // heads) * heads
        row_bytes = chunk.length // chunk.sizes[0]
        column, num_columns = (starts[1], lengths[1]) if len(starts) > 1 else (0, 1)
        # From a disk, read only these columns. From a store, one request per row would take forever.
        whole_rows = not isinstance(self.folder, Path)
        begin = 0 if whole_rows else column * chunk.dtype.itemsize
        part_bytes = row_bytes if whole_rows else num_columns * chunk.dtype.itemsize
        buffer = torch.empty((stop - first) * part_bytes, dtype=torch.uint8)
        self._read_rows(chunk, first * row_bytes + begin, row_bytes, part_bytes, memory_of(buffer))
        values = in_pairs(buffer.view(chunk.dtype).view(stop - first, -1), group)
        values = values[starts[0] - first :][: lengths[0]]
        values = values[:, column : column + num_columns] if whole_rows else values
        return values if len(lengths) > 1 else values.flatten()

    def _read_rows(self, chunk: StoredChunk, begin: int, row_bytes: int, part_bytes: int, target: memoryview) -> None:
        """Reads the same byte range of consecutive rows into memory."""
        with self._reading(chunk.file), self._file(chunk.file) as file:
            if part_bytes == row_bytes:
                fill(file, chunk.begin + begin, target)
            else:
                for row, at in enumerate(range(0, len(target), part_bytes)):
                    fill(file, chunk.begin + begin + row * row_bytes, target[at : at + part_bytes])
        self.num_bytes_read += len(target)
        self.num_chunks_read += 1

    def _file(self, name: str) -> IO[bytes]:
        """Follows links: a Hugging Face cache is made of them."""
        path = self.folder / name
        return path.open("rb", buffering=0) if isinstance(path, Path) else path.open("rb")

    # ---- growth and import ---------------------------------------------------------------------------------------

    def read_chunk(self, chunk: StoredChunk, buffer: Tensor | None = None) -> Tensor:
        """As in `SafeReader`, with the rows reordered."""
        values = super().read_chunk(chunk, buffer)
        group = self._group_of(chunk.name)
        return values if group is None else values.copy_(in_pairs(values, group))

    def _open(self, chunk: StoredChunk) -> IO[bytes]:
        with self._reading(chunk.file):
            return self._file(chunk.file)

    def _find(self, file: IO[bytes], chunk: StoredChunk) -> StoredValues:
        """The values are the whole chunk: safetensors has no archive around them."""
        stride = torch.empty(chunk.sizes, device="meta").stride()
        return StoredValues(chunk.dtype, chunk.sizes, stride, 0)


def in_pairs(values: Tensor, group: int | None) -> Tensor:
    """Reorders channels that rotate with the one half a head away to rotate with their neighbour.

    In each head, row i of the first half becomes row 2i, and row i of the second half row 2i + 1.

    Args:
        values: (heads * group, ...), whole heads.
        group: channels per head; None changes nothing.
    """
    if group is None:
        return values
    return values.unflatten(0, (-1, 2, group // 2)).transpose(1, 2).flatten(0, 2)


def in_halves(values: Tensor, group: int | None) -> Tensor:
    """The inverse of `in_pairs`."""
    if group is None:
        return values
    return values.unflatten(0, (-1, group // 2, 2)).transpose(1, 2).flatten(0, 2)
