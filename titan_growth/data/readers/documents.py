"""The documents of one file, whatever its kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from io import BufferedReader
from typing import Any

from titan_growth.data.readers.archive import Archive
from titan_growth.data.readers.compression import decompressed, open_bytes
from titan_growth.data.readers.files import JSON, PARQUET, TAR, TEXT, TSV, SourceFile
from titan_growth.data.readers.json_values import read_json
from titan_growth.data.readers.parquet import read_parquet
from titan_growth.data.readers.place import Place, reading
from titan_growth.data.readers.rows import Pass, Row
from titan_growth.data.readers.table import read_table
from titan_growth.data.readers.utf8 import text_parts
from titan_growth.data.remote import Remote

Document = Iterable[str]
"""One document, as text parts to be concatenated. Plain text is streamed, so it need not fit in memory."""


def read_documents(file: SourceFile, this: Pass) -> Iterator[Document]:
    """The documents of one file in order, from the first that is not skipped.

    Each is to be used up before the next. Raises DataError, with the place, for whatever the file can raise.
    """
    place = Place(file.path, file.name)
    with reading(place):
        if file.kind == PARQUET and file.size_bytes:
            with _seekable(file) as stream:
                for text in this.texts(read_parquet(stream, this, place), place):
                    yield (text,)
        elif file.kind == TAR and file.size_bytes:
            with open_bytes(file.path) as stream:
                for member in Archive(stream, place, this.account).members():
                    content = decompressed(member.stream, member.suffix)
                    yield from _documents(member.kind, partial(_opened, content), this, place)
        elif file.kind == TEXT or file.size_bytes:
            yield from _documents(file.kind, partial(open_bytes, file.path), this, place)


def _seekable(file: SourceFile) -> Any:
    return file.path.open_seekable() if isinstance(file.path, Remote) else open(file.path, "rb")


def _opened(stream: BufferedReader) -> AbstractContextManager[BufferedReader]:
    return contextlib.nullcontext(stream)


def _documents(
    kind: str, opened: Callable[[], AbstractContextManager[BufferedReader]], this: Pass, place: Place
) -> Iterator[Document]:
    """The documents of a stream that is opened if they are wanted."""
    if kind == TEXT:
        if not this.skip.take(1):
            yield _text(opened, this, place)
        return
    with opened() as stream:
        for text in this.texts(_rows(kind, stream, this, place), place):
            yield (text,)


def _text(opened: Callable[[], AbstractContextManager[BufferedReader]], this: Pass, place: Place) -> Document:
    """A text file, opened once someone reads it."""
    with reading(place), opened() as stream:
        yield from text_parts(stream, refuse_markup=this.rules.refuse_markup)


def _rows(kind: str, stream: BufferedReader, this: Pass, place: Place) -> Iterator[Row]:
    if kind == JSON:
        return read_json(stream, place)
    return read_table(stream, "\t" if kind == TSV else ",", this.rules.text, place)
