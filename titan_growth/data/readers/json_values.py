"""JSON: one object a line, or one array of objects.

What a field nobody reads may hold is no error, so an integer of more digits than Python converts is taken as a float.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from typing import Any, NamedTuple

from titan_growth.data.readers.place import BadRowError, Place, UnusableError
from titan_growth.data.readers.rows import Row
from titan_growth.data.readers.utf8 import LONGEST_RECORD_BYTES, Lines, Utf8, too_long
from titan_growth.data.streams import CHUNK_BYTES

_PLAIN, _OF_LONG_INTEGERS = json.JSONDecoder(), json.JSONDecoder(parse_int=float)
_SPACE = " \t\r\n"
_SPACES = re.compile(f"[{_SPACE}]*")
_FOLLOWING = {",", "]"}


def read_json(stream: BufferedReader, place: Place) -> Iterator[Row]:
    """The rows of a file, which is an array if its first character says so. Raises UnusableError."""
    beginning = stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _elements(stream, place) if beginning.startswith(b"[") else _lines(stream, place)


def _lines(stream: BufferedReader, place: Place) -> Iterator[Row]:
    """One row a line; blank lines do not count."""
    lines = Lines(stream, place)
    for line in lines:
        if line and not line.isspace():  # empty after a byte order mark with nothing behind it
            yield Row(partial(_record, lines, line), b"\\u" in line)


def _record(lines: Lines, line: bytes) -> Any:
    """The value of a line. Raises BadRowError."""
    text = lines.decode(line).strip(_SPACE)
    try:
        record, end = _decoded(text, 0)
    except json.JSONDecodeError as error:
        raise _broken(error.colno, error.msg) from error
    except RecursionError as error:
        raise BadRowError("JSON nested too deeply", "Each line must be one object") from error
    if end < len(text):
        raise _broken(end + 1, "Extra data")
    return record


def _broken(column: int, reason: str) -> BadRowError:
    return BadRowError(f"broken JSON at column {column} ({reason})", "Each line must be one whole JSON object")


class _Decoded(NamedTuple):
    value: Any
    end: int
    """Position after the value."""


def _decoded(text: str, start: int) -> _Decoded:
    """The value that begins at a position. Raises JSONDecodeError or RecursionError."""
    try:
        return _Decoded(*_PLAIN.raw_decode(text, start))
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _Decoded(*_OF_LONG_INTEGERS.raw_decode(text, start))


def _elements(stream: BufferedReader, place: Place) -> Iterator[Row]:
    """The elements of an array, of which one at a time is held in memory."""
    window = _Window(Utf8(stream))
    number, follows = 0, window.next_character()
    window.position += 1  # the bracket
    while follows != "]":
        if number == 0 and window.next_character() == "]":
            window.position += 1
            break
        number += 1
        place.row = f"element {number:,}"
        value = window.value()
        follows = window.next_character()
        window.position += 1  # a comma or the last bracket
        yield Row(lambda value=value: value, may_have_surrogates=True)  # type: ignore[misc]
    place.row = ""
    if window.next_character():
        raise UnusableError("text follows the end of the JSON array", "Put every record into the one array")


class _Window:
    """The part of a JSON text that is held in memory."""

    def __init__(self, text: Utf8) -> None:
        self._source = text
        self._text = ""
        self.position = 0

    def next_character(self) -> str:
        """The next character that is no white space, at which the position is left; empty at the end."""
        while True:
            self.position = self._after_space(self.position)
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The next value, which a comma or a bracket must follow. Raises UnusableError."""
        self.next_character()
        while True:
            try:
                value, end = _decoded(self._text, self.position)
                end = self._after_space(end)
                if self._text[end : end + 1] in _FOLLOWING:
                    self.position = end
                    return value
                problem = "no comma follows"
            except json.JSONDecodeError as error:
                problem = error.msg
            except RecursionError as error:
                raise UnusableError("JSON nested too deeply", "Each element must be one object") from error
            if not self._more():  # until then it may go on beyond what has been read, a number too
                raise UnusableError(f"broken JSON ({problem})", "Write the array again, or copy it again")

    def _after_space(self, position: int) -> int:
        """The next position at which there is no white space."""
        return _SPACES.match(self._text, position).end()  # type: ignore[union-attr]  # it matches nothing, too

    def _more(self) -> bool:
        """Reads as much again as is held, so that a long value is not decoded often. False at the end."""
        held = len(self._text) - self.position
        if held > LONGEST_RECORD_BYTES:
            raise too_long("an element of a JSON array")
        more = self._source.read(max(CHUNK_BYTES, held))
        if more is None:
            return False
        self._text, self.position = self._text[self.position :] + more, 0
        return True
