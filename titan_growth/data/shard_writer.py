"""Appending the token stream of one split to shards, resumable after a crash.

A writer's state is the number of tokens and documents and the running checksums. Restored from a state, it truncates
its files to it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class SplitWriter:
    """Writes `<split>-00000.bin`, ... of exactly `shard_tokens` tokens each (the last one fewer) and `<split>.idx`."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, state: dict[str, Any] | None) -> None:
        self._folder = folder
        self._split = split
        self._index_name = f"{split}.idx"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        state = state or {"num_tokens": 0, "num_documents": 0, "shard_crcs": [], "index_crc": 0}
        self.num_tokens: int = state["num_tokens"]
        self.num_documents: int = state["num_documents"]
        self._shard_crcs: list[int] = list(state["shard_crcs"])
        self._index_crc: int = state["index_crc"]
        for number in range(self.num_complete_shards):
            self._check_size(self._shard_path(number), shard_tokens * self._dtype.itemsize)
        self._index = self._open_cut(folder / self._index_name, self.num_documents * 8)
        self._shard = self._open_cut(self._shard_path(self.num_complete_shards), self._last_shard_bytes)

    @property
    def num_complete_shards(self) -> int:
        """How many shards are full."""
        return self.num_tokens // self._shard_tokens

    @property
    def _last_shard_bytes(self) -> int:
        return self.num_tokens % self._shard_tokens * self._dtype.itemsize

    def _shard_path(self, number: int) -> Path:
        return self._folder / f"{self._split}-{number:05d}.bin"

    def begin_document(self) -> None:
        """Note that a document starts at the next token."""
        entry = np.array([self.num_tokens], dtype="<u8").tobytes()
        self._index.write(entry)
        self._index_crc = zlib.crc32(entry, self._index_crc)
        self.num_documents += 1

    def append(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens to the stream, opening the next shard when one is full."""
        array = np.array(tokens, dtype=self._dtype)
        while array.size:
            room = self._shard_tokens - self.num_tokens % self._shard_tokens
            chunk, array = array[:room], array[room:]
            data = chunk.tobytes()
            self._shard.write(data)
            shard = self.num_complete_shards
            if shard == len(self._shard_crcs):
                self._shard_crcs.append(0)
            self._shard_crcs[shard] = zlib.crc32(data, self._shard_crcs[shard])
            self.num_tokens += len(chunk)
            if chunk.size == room:
                _sync(self._shard)
                self._shard.close()
                self._shard = self._open_cut(self._shard_path(self.num_complete_shards), 0)

    def state(self) -> dict[str, Any]:
        """Make what was written durable and return the state to resume from."""
        for file in (self._shard, self._index):
            _sync(file)
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "shard_crcs": list(self._shard_crcs),
            "index_crc": self._index_crc,
        }

    def finish(self) -> dict[str, Any]:
        """Close the files and return the split's entry for meta.json."""
        self.close()
        if self._last_shard_bytes == 0:
            # Opened after the last full shard, and empty.
            self._shard_path(self.num_complete_shards).unlink()
        shards = []
        for number, crc in enumerate(self._shard_crcs):
            path = self._shard_path(number)
            num_tokens = min(self._shard_tokens, self.num_tokens - number * self._shard_tokens)
            size_bytes = num_tokens * self._dtype.itemsize
            shards.append({"file": path.name, "num_tokens": num_tokens, "size_bytes": size_bytes, "crc32": crc})
        index = {"file": self._index_name, "size_bytes": self.num_documents * 8, "crc32": self._index_crc}
        counts = {"num_tokens": self.num_tokens, "num_documents": self.num_documents}
        return {**counts, "shards": shards, "index": index}

    def close(self) -> None:
        """Make durable and close the files."""
        for file in (self._shard, self._index):
            if not file.closed:
                _sync(file)
                file.close()

    def _open_cut(self, path: Path, size_bytes: int) -> BinaryIO:
        """Open for appending after `size_bytes` bytes. Raises ValueError if there are fewer."""
        self._check_size(path, size_bytes, or_more=True)
        file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by close())
        file.truncate(size_bytes)
        file.seek(size_bytes)
        return file

    @staticmethod
    def _check_size(path: Path, size_bytes: int, or_more: bool = False) -> None:
        size = path.stat().st_size if path.exists() else 0
        if size < size_bytes or (size > size_bytes and not or_more):
            raise ValueError(f"{path.name} has {size} bytes instead of {size_bytes}")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
