"""Tables as text: csv and tsv with a header, one document a row."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from functools import partial
from io import BufferedReader

from titan_growth.data.readers.place import BadRowError, Place, UnusableError
from titan_growth.data.readers.rows import Row
from titan_growth.data.readers.text_rule import TextRule, missing
from titan_growth.data.readers.utf8 import LONGEST_RECORD_BYTES, Lines

_QUOTES = "Quote fields that hold quotes or line breaks, and double the quotes in them"


def read_table(stream: BufferedReader, delimiter: str, rule: TextRule, place: Place) -> Iterator[Row]:
    """The rows below the header; blank lines do not count. Raises UnusableError."""
    texts = _Texts(Lines(stream, place))
    # Strict, for without it a quote in the wrong place silently joins or cuts fields.
    rows = csv.reader(iter(texts), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        first_line = place.line + 1
        try:
            with _long_fields():
                values = next(rows, None)
        except csv.Error as error:
            place.line = first_line
            raise UnusableError(f"the row that begins here is broken ({error})", _QUOTES) from error
        if values is None:
            return
        last_line, place.line = place.line, first_line
        problem = texts.take_problem()
        if not header:
            if problem is not None:
                raise problem
            header = values  # or a blank line
            _require(header, rule)
        elif values:
            yield Row(partial(_record, header, values, problem))
        place.line = last_line


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Python's limit of 128 KiB is no property of files. It is one of the process, so it is put back."""
    before = csv.field_size_limit(LONGEST_RECORD_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _Texts:
    """Lines as text. One that is no UTF-8 makes a bad row, and leaves the quotes of the others in order."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._problem: BadRowError | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            try:
                yield self._lines.decode(line)
            except BadRowError as error:
                self._problem = self._problem or error
                yield line.decode("utf-8", errors="replace")

    def take_problem(self) -> BadRowError | None:
        """What was wrong with a line since the last call."""
        problem, self._problem = self._problem, None
        return problem


def _require(header: list[str], rule: TextRule) -> None:
    """Raises UnusableError unless the header has each wanted column once."""
    for name in rule.fields if header else ():
        if name not in header:
            raise missing(name, header)
        if header.count(name) > 1:
            raise UnusableError(f"the header has {name!r} {header.count(name)} times", "Give each column its own name")


def _record(header: list[str], values: list[str], problem: BadRowError | None) -> dict[str, str]:
    """A row by its columns. Raises BadRowError for one with a problem, and one that has more or fewer."""
    if problem is not None:
        raise problem
    if len(values) != len(header):
        raise BadRowError(f"{len(values)} fields where the header has {len(header)}", _QUOTES)
    return dict(zip(header, values, strict=True))
