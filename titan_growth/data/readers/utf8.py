"""Bytes as text: whole files a chunk at a time, and lines of bounded length."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO, TypeVar

from titan_growth.data.readers.files import MARKUP_FIX
from titan_growth.data.readers.place import BadRowError, Place, UnusableError
from titan_growth.data.streams import CHUNK_BYTES

LONGEST_RECORD_BYTES = 1 << 27
"""Of a JSON line, an element of a JSON array, a field of a table: they are held in memory, and damage can join them."""
ErrorT = TypeVar("ErrorT", bound=UnusableError)
_MARKUP_BEGINNINGS = ("<!doctype html", "<html", "<?xml")


def too_long(what: str) -> UnusableError:
    """The error for a record of more than `LONGEST_RECORD_BYTES`."""
    fix = "It may be damaged, or no such file at all; cut up what is really that long"
    return UnusableError(f"{what} of more than {LONGEST_RECORD_BYTES >> 20} MiB", fix)


class Utf8:
    """Decodes a stream a chunk at a time. A byte order mark at the beginning is dropped."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = 0
        self._is_at_beginning = True

    def read(self, num_bytes: int = CHUNK_BYTES) -> str | None:
        """The text of about the next `num_bytes`, None at the end. Raises UnusableError with the byte offset."""
        chunk = self._stream.read(num_bytes)
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # error.object starts with the bytes kept from the previous chunk.
            offset = self._num_bytes + len(chunk) - len(error.object) + error.start
            raise not_utf8(UnusableError, offset, error) from error
        if self._is_at_beginning and text:
            self._is_at_beginning, text = False, text.removeprefix("\ufeff")
        self._num_bytes += len(chunk)
        return text if chunk else None


def not_utf8(kind: type[ErrorT], offset: int, error: UnicodeDecodeError) -> ErrorT:
    """The error for bytes that are no text; `offset` counts from the beginning of the file."""
    byte = error.object[error.start]
    fix = "Convert the file to UTF-8 (for example with iconv) or leave it out"
    return kind(f"byte offset {offset} is not valid UTF-8 (0x{byte:02x})", fix)


def text_parts(stream: BinaryIO, *, refuse_markup: bool) -> Iterator[str]:
    """A text file as parts of about 1 MiB. Raises UnusableError; also for HTML and XML, if that is refused."""
    text = Utf8(stream)
    is_first = True
    while (part := text.read()) is not None:
        if is_first and refuse_markup and part[:1000].lstrip().lower().startswith(_MARKUP_BEGINNINGS):
            raise UnusableError("holds HTML or XML, not plain text", f"{MARKUP_FIX[:1].upper()}{MARKUP_FIX[1:]}")
        is_first = False
        if part:
            yield part


class Lines:
    """The lines of a stream with their ends, counted in its `Place`; a byte order mark is dropped."""

    def __init__(self, stream: BinaryIO, place: Place) -> None:
        self._stream = stream
        self._place = place
        self.offset = 0
        """Of the beginning of the current line, in bytes."""

    def __iter__(self) -> Iterator[bytes]:
        """Raises UnusableError at a line that is too long."""
        end = 0
        while line := self._stream.readline(LONGEST_RECORD_BYTES + 1):
            self.offset, end = end, end + len(line)
            self._place.line += 1
            if len(line) > LONGEST_RECORD_BYTES:
                raise too_long("a line")
            yield line.removeprefix(codecs.BOM_UTF8) if self.offset == 0 else line

    def decode(self, line: bytes) -> str:
        """A line as text. Raises BadRowError with the byte offset."""
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(BadRowError, self.offset + error.start, error) from error
