"""Reading documents out of single files: plain text, JSON lines and parquet, plain or compressed.

Files are streamed. A document is a sequence of text parts, so a plain text file (one document) need not fit in memory.
Every error names the file and the position in it.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from titan_growth.data.remote import Remote
from titan_growth.data.streams import CHUNK_BYTES, buffered, unzstd
from titan_growth.tools.errors import DataError, TitanGrowthError

TEXT, JSON, PARQUET = "text", "json", "parquet"
KINDS = (TEXT, JSON, PARQUET)
_KIND_OF_SUFFIX = {
    **dict.fromkeys((".txt", ".text", ".md", ".py"), TEXT),
    **dict.fromkeys((".json", ".jsonl", ".jsonlines", ".ndjson"), JSON),
    ".parquet": PARQUET,
}
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_LIBRARY_READERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PARQUET_BATCH_ROWS = 256
_TYPICAL_COMPRESSION = 3  # of text; only progress bars and the size of validation pieces depend on it

Document = Iterable[str]
"""One document, as text parts to be concatenated."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: where it is, its name relative to the corpus, and how to read it."""

    path: Path | Remote
    name: str
    kind: str
    size_bytes: int
    mark: str
    """Changes when the file does: inode and times, or the storage's ETag or the like (`remote`)."""
    is_versioned: bool = False
    """Whether the mark is a version that the storage gives, and no mere time."""

    @property
    def approximate_text_bytes(self) -> int:
        """Size of the text in bytes, guessed for compressed files."""
        compressed = self.path.suffix.lower() in _COMPRESSIONS or self.kind == PARQUET
        return self.size_bytes * (_TYPICAL_COMPRESSION if compressed else 1)


class Skip:
    """The number of documents still to skip before reading starts."""

    def __init__(self, num_documents: int) -> None:
        self.remaining = num_documents

    def take(self, available: int) -> int:
        """How many of `available` documents to skip."""
        taken = min(self.remaining, available)
        self.remaining -= taken
        return taken


def kind_of(path: Path | Remote) -> str | None:
    """The kind of a file by its extension, None if unknown."""
    suffixes = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if suffixes[-1] in _COMPRESSIONS:
        kind = _KIND_OF_SUFFIX.get(suffixes[-2])
        return kind if kind != PARQUET else None
    return _KIND_OF_SUFFIX.get(suffixes[-1])


@contextlib.contextmanager
def reading(path: Path | Remote) -> Iterator[None]:
    """Turn errors of the operating system, storage and decompressors while reading `path` into a DataError."""
    remote = isinstance(path, Remote)
    try:
        yield
    except TitanGrowthError:
        raise
    except PermissionError as error:
        fix = "Check the credentials and what they allow" if remote else "Make it readable for the user who trains"
        where = path if remote else error.filename or path
        raise DataError(f"{where}: no permission to read it. {fix}") from error
    except FileNotFoundError as error:
        fix = "Check the URL" if remote else "Check the path (dataset_path, tokenizer path)"
        raise DataError(f"{path}: does not exist. {fix}") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: the compressed data is truncated or damaged ({error}). Copy or download it again"
        ) from error
    except Exception as error:
        if not remote and not isinstance(error, OSError):
            raise
        # Storage packages, and what they build on, have exceptions of their own.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        fix = "Check the file, the connection and the credentials" if remote else "Check the file and its disk"
        raise DataError(f"{path}: cannot be read ({' '.join(reason.split())[:300]}). {fix}") from error


def read_documents(file: SourceFile, text_key: str, skip: Skip) -> Iterator[Document]:
    """The documents of one file in order, from the first that `skip` leaves. Raises DataError."""
    if file.kind == TEXT:
        if not skip.take(1):
            yield read_text(file.path)
    elif file.size_bytes:
        read = read_json_lines if file.kind == JSON else read_parquet
        for text in read(file.path, text_key, skip):
            yield (text,)


def read_text(path: Path | Remote) -> Iterator[str]:
    """A plain (or compressed) text file as parts of about 1 MiB; a byte order mark is dropped. Raises DataError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    with reading(path), _open(path) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            try:
                part = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # error.object starts with the bytes kept from the previous chunk.
                offset = num_bytes + len(chunk) - len(error.object) + error.start
                raise DataError(
                    f"{path}: byte offset {offset} is not valid UTF-8 (0x{error.object[error.start]:02x}). "
                    "Convert the file to UTF-8 (for example with iconv) or leave it out"
                ) from error
            if num_bytes == 0:
                part = part.removeprefix("\ufeff")
            num_bytes += len(chunk)
            if part:
                yield part
            if not chunk:
                return


def read_json_lines(path: Path | Remote, text_key: str, skip: Skip) -> Iterator[str]:
    """The texts of a JSON-lines file (one object a line; blank lines do not count). Raises DataError."""
    offset = 0
    with reading(path), _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            start, offset = offset, offset + len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace() or skip.take(1):
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte offset {start + error.start} is not valid UTF-8. Convert the file to UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: broken JSON at column {error.colno} ({error.msg}). "
                    "Each line must be one whole JSON object"
                ) from error
            except RecursionError as error:
                raise DataError(f"{path}:{number}: JSON nested too deeply. Each line must be one object") from error
            yield _text_of_record(record, text_key, f"{path}:{number}", may_have_surrogates=b"\\u" in line)


def _text_of_record(record: Any, text_key: str, where: str, may_have_surrogates: bool) -> str:
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__} instead of an object. "
            "Write one object per line (for an array: jq -c '.[]')"
        )
    if text_key not in record:
        raise DataError(missing_key(where, text_key, list(record)))
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: the field {text_key!r} is {type(text).__name__}, not a string. "
            "Name another field as text_key or repair the line"
        )
    if may_have_surrogates:
        # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the field {text_key!r} has a lone surrogate at character {error.start}. Repair the line"
            ) from error
    return text


def missing_key(where: str, text_key: str, keys: list[str]) -> str:
    """The message for a missing text key; lists the keys there are."""
    shown = ", ".join(keys[:20]) if keys else "none"
    return f"{where}: no field {text_key!r}; it has: {shown}. Set text_key to the one that holds the text"


def read_parquet(path: Path | Remote, text_key: str, skip: Skip) -> Iterator[str]:
    """The texts of one column of a parquet file, row group by row group. Raises DataError."""
    pa = import_module("pyarrow")  # by name: it ships no types
    with reading(path), path.open_seekable() if isinstance(path, Remote) else open(path, "rb") as stream:
        try:
            yield from _parquet_texts(path, stream, text_key, skip)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: truncated or not a parquet file ({reason}). Copy or write it again") from error


def _parquet_texts(path: Path | Remote, stream: BinaryIO, text_key: str, skip: Skip) -> Iterator[str]:
    with import_module("pyarrow.parquet").ParquetFile(stream) as table:
        schema = table.schema_arrow
        if text_key not in schema.names:
            raise DataError(missing_key(str(path), text_key, schema.names))
        column_type = schema.field(text_key).type
        if str(column_type) not in ("string", "large_string", "string_view"):
            raise DataError(
                f"{path}: the column {text_key!r} holds {column_type}, not strings. Name another one as text_key"
            )
        row = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            skipped = skip.take(num_rows)
            if skipped < num_rows:
                batches = table.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group], columns=[text_key])
                texts = (text for batch in batches for text in batch.column(0).to_pylist())
                for number, text in islice(enumerate(texts, start=row), skipped, None):
                    if text is None:
                        raise DataError(
                            f"{path}: row {number}: the column {text_key!r} is null, not a string. Remove the row"
                        )
                    yield text
            row += num_rows


@contextlib.contextmanager
def _open(path: Path | Remote) -> Iterator[Any]:
    """The file's bytes, decompressed, as a binary stream."""
    with path.open() if isinstance(path, Remote) else open(path, "rb") as stored:
        suffix = path.suffix.lower()
        if suffix in _LIBRARY_READERS:
            with _LIBRARY_READERS[suffix](stored) as stream:
                yield stream
        else:
            yield buffered(unzstd(stored)) if suffix == ".zst" else stored
