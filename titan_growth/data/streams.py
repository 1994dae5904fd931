"""Streams that never pass off a truncated file as a whole one."""

from __future__ import annotations

import io
from collections.abc import Generator
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20


class ChunkStream(io.RawIOBase):
    """Chunks of bytes as a binary stream; closing it closes their generator."""

    def __init__(self, chunks: Generator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")  # cut without copying: a chunk may be large

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._chunks.close()
        super().close()


def buffered(chunks: Generator[bytes]) -> io.BufferedReader:
    """Chunks of bytes as a buffered stream."""
    return io.BufferedReader(ChunkStream(chunks), CHUNK_BYTES)


def whole(source: BinaryIO) -> Generator[bytes]:
    """All bytes of a file in storage; a lost connection may look like the end of the file. Raises OSError if it is."""
    with source:
        size, num_bytes = getattr(source, "size", None), 0
        while data := source.read(CHUNK_BYTES):
            num_bytes += len(data)
            yield data
        if size is not None and num_bytes < size:
            raise OSError(f"it ended after {num_bytes:,} of {size:,} bytes")
