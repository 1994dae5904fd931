"""A Hugging Face folder as a checkpoint of ours: the same interface as `SafeReader`, so loads and growths take either.

Names are ours, and so is the order of the rows of each head. Tensors are shown in pieces of whole heads and at most 64
MiB, so that whoever needs some rows, or makes one tensor out of many, holds little at a time. A load reads exactly the
rows and columns of a rank's shards, and puts them in their places piece by piece; nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from titan_growth.checkpoint.reader import NamesOf, SafeReader, StoredChunk, renamed
from titan_growth.interchange.folder import HuggingFaceFolder, open_folder
from titan_growth.interchange.safetensors_file import StoredTensor, fill, memory_of
from titan_growth.models.config import ModelConfig
from titan_growth.tools.errors import CheckpointError

PIECE_BYTES = 64 * 2**20
"""Of a piece, unless one head has more."""

_MUST_AGREE = {
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "head_dim": "head_dim",
}
"""What the shapes of the weights do not tell, and without which they mean nothing: field -> recipe key."""

_MAY_DIFFER = {
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_scaling_factor",
    "rope_low_freq_factor": "rope_low_freq_factor",
    "rope_high_freq_factor": "rope_high_freq_factor",
    "rope_original_max_seq_len": "rope_original_max_seq_len",
}


@dataclass(frozen=True)
class _Piece:
    """What DCP's metadata says of where a piece is; the first three names are those of DCP's own class."""

    relative_path: str
    offset: int
    length: int
    tensor: StoredTensor
    group: int | None
    """Rows of a head, where the order in it is another."""
    first_row: int


class HuggingFaceReader(SafeReader):
    """Reads a folder when it is first asked for something; a folder that is refused raises CheckpointError then.

    Args:
        names_of: as of `SafeReader`.
        family, config: what the weights are wanted for. A folder of another model is refused.
    """

    def __init__(
        self,
        path: Path,
        names_of: NamesOf | None = None,
        *,
        family: str | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__(path, names_of)
        self.family, self.config = family, config
        self._opened: HuggingFaceFolder | None = None
        self._chunks: dict[str, list[StoredChunk]] | None = None
        self._pieces: dict[StoredChunk, _Piece] = {}

    @property
    def opened(self) -> HuggingFaceFolder:
        """The folder, checked."""
        if self._opened is None:
            opened = open_folder(self.folder)
            self._require_same(opened)
            self._opened = opened
        return self._opened

    def _require_same(self, opened: HuggingFaceFolder) -> None:
        if self.family is not None and opened.section.name != self.family:
            raise CheckpointError(
                f"{self.folder.name} refused: it is of the family {opened.section.name}, the recipe of {self.family}"
            )
        for field, key in _MUST_AGREE.items() if self.config is not None else ():
            theirs, ours = getattr(opened.config, field), getattr(self.config, field)
            if theirs != ours:
                raise CheckpointError(
                    f"{self.folder.name} refused: it is of another model: {key} is {theirs} there and {ours} here"
                )

    def differences(self) -> list[str]:
        """Settings of the recipe that make another function of the same weights, a line each."""
        if self.config is None:
            return []
        theirs = self.opened.config
        return [
            f"model.{key} is {getattr(self.config, field)}, and {self.folder.name} was trained with "
            f"{getattr(theirs, field)}"
            for field, key in _MAY_DIFFER.items()
            if getattr(theirs, field) != getattr(self.config, field)
            and not (self.config.rope_scaling_factor == theirs.rope_scaling_factor == 1 and field in _ONLY_SCALED)
        ]

    # ---- DCP -----------------------------------------------------------------------------------------------------

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata that a checkpoint with these weights would have. Raises CheckpointError."""
        entries: dict[str, Any] = {}
        storage: dict[MetadataIndex, Any] = {}
        for name, tensor in self.opened.tensors.items():
            chunks = []
            for piece in self._pieces_of(name, tensor):
                offsets, sizes = _box(piece)
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                storage[MetadataIndex(name, torch.Size(offsets))] = piece
            properties = TensorProperties(dtype=tensor.dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        metadata = Metadata(entries, storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id))
        return metadata if self.names_of is None else renamed(metadata, self.names_of)

    def _pieces_of(self, name: str, tensor: StoredTensor) -> Iterator[_Piece]:
        group = self.opened.layout.group_of(name, self.opened.config)
        num_rows = tensor.shape[0]
        row_bytes = tensor.num_bytes // num_rows
        step = max(1, PIECE_BYTES // (row_bytes * (group or 1))) * (group or 1)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            begin, length = tensor.begin + start * row_bytes, (stop - start) * row_bytes
            yield _Piece(tensor.file, begin, length, tensor, group, start)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Serves all requests of this rank. What several of them ask for (tied weights) is read once."""
        same: dict[Any, list[ReadItem]] = {}
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise CheckpointError(f"{item.storage_index.fqn} is not stored as a tensor")
            piece: Any = self.storage_data[item.storage_index]
            key = (piece.relative_path, piece.offset, tuple(item.storage_offsets), tuple(item.lengths))
            same.setdefault(key, []).append(item)
        for (_, _, starts, lengths), items in sorted(same.items(), key=lambda entry: entry[0]):
            values = self._part(self.storage_data[items[0].storage_index], starts, lengths)
            for item in items:
                target = planner.resolve_tensor(item).detach()
                target.copy_(values)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, piece: Any, starts: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
        """A box of a piece: whole heads are read where their rows have another order, and no other columns."""
        tensor, group = piece.tensor, piece.group or 1
        first, stop = starts[0] // group * group, -(-(starts[0] + lengths[0]) // group) * group
        num_rows, num_columns = stop - first, lengths[1] if len(lengths) > 1 else 1
        item_bytes = tensor.dtype.itemsize
        row_bytes = piece.length // _box(piece)[1][0]
        part_bytes = num_columns * item_bytes
        buffer = torch.empty(num_rows * part_bytes, dtype=torch.uint8)
        view = memory_of(buffer)
        begin = piece.offset + first * row_bytes + (starts[1] * item_bytes if len(starts) > 1 else 0)
        with self._file(piece.relative_path) as file:
            if part_bytes == row_bytes:
                fill(file, begin, view)
            else:
                for row in range(num_rows):
                    fill(file, begin + row * row_bytes, view[row * part_bytes : (row + 1) * part_bytes])
        self.num_bytes_read += len(view)
        self.num_chunks_read += 1
        values = buffer.view(tensor.dtype).view(num_rows, *([num_columns] if len(lengths) > 1 else []))
        return in_pairs(values, piece.group)[starts[0] - first :][: lengths[0]]

    def _file(self, name: str) -> BinaryIO:
        return open(self.folder / name, "rb", buffering=0)

    # ---- growth --------------------------------------------------------------------------------------------------

    def chunks(self) -> dict[str, list[StoredChunk]]:
        """As of `SafeReader`."""
        if self._chunks is None:
            self._chunks = {}
            metadata = self.read_metadata()
            for index, piece in metadata.storage_data.items():
                where = (piece.relative_path, piece.offset, piece.length)
                chunk = StoredChunk(index.fqn, *_box(piece), piece.tensor.dtype, *where)
                self._chunks.setdefault(index.fqn, []).append(chunk)
                self._pieces[chunk] = piece
        return self._chunks

    def read_chunk(self, chunk: StoredChunk, buffer: Tensor | None = None) -> Tensor:
        """As of `SafeReader`."""
        self.chunks()
        buffer = torch.empty(chunk.length, dtype=torch.uint8) if buffer is None else buffer[: chunk.length]
        try:
            with self._file(chunk.file) as file:
                fill(file, chunk.begin, memory_of(buffer))
        except OSError as error:
            raise CheckpointError(f"{self.folder.name}/{chunk.file} cannot be read ({error.strerror})") from None
        self.num_bytes_read += chunk.length
        self.num_chunks_read += 1
        values = buffer.view(chunk.dtype).view(chunk.sizes)
        if group := self._pieces[chunk].group:
            values.copy_(in_pairs(values, group))
        return values


_ONLY_SCALED = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len")


def _box(piece: _Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of a piece in its tensor."""
    num_rows, *others = piece.tensor.shape
    rows = piece.length // (piece.tensor.num_bytes // num_rows)
    return (piece.first_row, *(0 for _ in others)), (rows, *others)


def in_pairs(values: Tensor, group: int | None) -> Tensor:
    """From channels that turn with the one half a head away to those that turn with their neighbour.

    Row i of the first half of each head becomes row 2i, and row i of the second half row 2i + 1.

    Args:
        values: (heads * group, ...), whole heads.
        group: channels of a head; None leaves all as it is.
    """
    if group is None:
        return values
    return values.unflatten(0, (-1, 2, group // 2)).transpose(1, 2).flatten(0, 2)


def in_halves(values: Tensor, group: int | None) -> Tensor:
    """The inverse of `in_pairs`."""
    if group is None:
        return values
    return values.unflatten(0, (-1, group // 2, 2)).transpose(1, 2).flatten(0, 2)
