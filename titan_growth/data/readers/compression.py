"""Decompressing while reading, in bounded memory. A truncated file is never passed off as a whole one."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from titan_growth.data.readers.files import compression_of
from titan_growth.data.readers.place import UnusableError
from titan_growth.data.remote import Remote
from titan_growth.data.streams import CHUNK_BYTES, buffered
from titan_growth.tools.memory import available_bytes
from titan_growth.tools.text import gib, one_line

_ZSTD_INPUT_BYTES = 2048
"""A block of 4 bytes can stand for 128 KiB, so this much gives at most 64 MiB at once."""
_ZSTD_HEADER_BYTES = 18
_ZSTD_USUAL_WINDOW_BYTES = 1 << 27
_ZSTD_LARGEST_WINDOW_BYTES = 1 << 31


@contextlib.contextmanager
def open_bytes(path: Path | Remote) -> Iterator[io.BufferedReader]:
    """A file's bytes, decompressed by its extension. Raises UnusableError, and what storage and libraries raise."""
    with path.open() if isinstance(path, Remote) else open(path, "rb") as stored:
        yield decompressed(stored, path.suffix)


def decompressed(stored: io.BufferedReader, suffix: str) -> io.BufferedReader:
    """A stream, decompressed if the extension says that it is compressed."""
    match compression_of(suffix):
        case ".gz":
            return buffered(_ungzip(stored))
        case ".bz2":
            return buffered(_streams(stored, bz2.BZ2Decompressor))
        case ".xz":
            return buffered(_streams(stored, lzma.LZMADecompressor))
        case ".zst":
            return buffered(_unzstd(stored))
    return stored


def _ungzip(stored: BinaryIO) -> Generator[bytes]:
    """The library's own reader, which notices whatever follows a stream and is none."""
    with gzip.open(stored) as stream:
        while True:
            try:
                chunk = stream.read(CHUNK_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _damaged(error) from error
            if not chunk:
                return
            yield chunk


def _streams(stored: BinaryIO, new: Callable[[], Any]) -> Generator[bytes]:
    """Stream after stream of bz2 or xz. The libraries' files would take a damaged one for the end.

    new: makes a decompressor of one stream.
    """
    stream, compressed = None, b""
    while compressed := compressed or stored.read(CHUNK_BYTES):
        if stream is None:
            compressed = compressed.lstrip(b"\0")  # with which xz may pad; no stream begins so
            stream = new() if compressed else None
            continue
        try:
            yield stream.decompress(compressed, CHUNK_BYTES)
            while not (stream.eof or stream.needs_input):
                yield stream.decompress(b"", CHUNK_BYTES)
        except (OSError, ValueError, lzma.LZMAError) as error:
            raise _damaged(error) from error
        compressed = stream.unused_data if stream.eof else b""
        stream = None if stream.eof else stream
    if stream is not None:
        raise _damaged(EOFError("it ends in the middle of a stream"))


def _unzstd(stored: BinaryIO) -> Generator[bytes]:
    """Frame after frame. The library's own reader would accept a truncated one."""
    frame, compressed = None, b""
    while compressed := compressed or stored.read(_ZSTD_INPUT_BYTES):
        if frame is None:
            compressed += stored.read(max(0, _ZSTD_HEADER_BYTES - len(compressed)))
            _require_memory(compressed)
            frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_LARGEST_WINDOW_BYTES).decompressobj()
        try:
            yield frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise _damaged(error) from error
        compressed = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
    if frame is not None:
        raise _damaged(EOFError("it ends in the middle of a zstd frame"))


def _require_memory(header: bytes) -> None:
    """Refuses a frame of a long window (`zstd --long`) that the free memory cannot hold."""
    try:
        window = zstandard.get_frame_parameters(header).window_size
    except zstandard.ZstdError:
        return  # decompressing says what is wrong
    if not _ZSTD_USUAL_WINDOW_BYTES < window <= _ZSTD_LARGEST_WINDOW_BYTES:
        return
    available = available_bytes()
    if available is not None and window > available:
        what = f"it was compressed with zstd --long={window.bit_length() - 1}, so reading it takes {gib(window)}"
        fix = "Free some, or compress it again without --long: zstd -dc --long=31 FILE | zstd -o NEW"
        raise UnusableError(f"{what} of memory, and {gib(available)} are free", fix)


def _damaged(error: Exception) -> UnusableError:
    """The error for compressed data that cannot be decompressed."""
    reason = one_line(str(error), 200)
    return UnusableError(f"the compressed data is truncated or damaged ({reason})", "Copy or download it again")
