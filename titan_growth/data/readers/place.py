"""Where reading is, and one message for whatever a file can raise.

A reader does not know the name of what it reads. It raises `UnusableError`, or lets a library raise what it likes, and
keeps its `Place` up to date; `reading` makes a DataError of both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from titan_growth.data.remote import Remote
from titan_growth.tools.errors import DataError, TitanGrowthError
from titan_growth.tools.text import one_line

_REASON_CHARS = 300


class UnusableError(Exception):
    """A file that cannot be read as what it should be: the reason, and what to do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}. {fix}")
        self.reason, self.fix = reason, fix


class BadRowError(UnusableError):
    """One row (a JSON line, a table's row) that gives no text; the rows after it can be read."""


class Place:
    """Where reading is: a file, a member of it if it is an archive, and a line or row.

    Args:
        name: of the file, relative to the corpus.
    """

    def __init__(self, path: Path | Remote, name: str) -> None:
        self.path = path
        self.name = name
        self.member = ""
        self.line = 0
        """Counted from 1; 0: none."""
        self.row = ""
        """`row 7`, `element 7`, where there are no lines."""

    def enter(self, member: str) -> None:
        """Reading goes on in a member of the archive."""
        self.member, self.line, self.row = member, 0, ""

    @property
    def is_remote(self) -> bool:
        """Whether the file is in storage, where other things go wrong than on a disk."""
        return isinstance(self.path, Remote)

    @property
    def short(self) -> str:
        """The place with the file's name in the corpus, the same wherever the corpus lies."""
        return self._at(self.name)

    def __str__(self) -> str:
        return self._at(str(self.path))

    def _at(self, file: str) -> str:
        """The place in a file that is called so."""
        parts = [file, self.member, self.row]
        text = ": ".join(part for part in parts if part)
        return f"{text}:{self.line}" if self.line else text


@contextlib.contextmanager
def reading(where: Path | Remote | Place) -> Iterator[None]:
    """Turn whatever is raised while reading into a DataError: one line that names the place."""
    place = where if isinstance(where, Place) else Place(where, "")
    try:
        yield
    except TitanGrowthError:
        raise
    except Exception as error:  # libraries raise what they like, and every file can be damaged
        raise DataError(_message(place, error)) from error


def _message(place: Place, error: Exception) -> str:
    """One line: where, what, and what to do."""
    match error:
        case UnusableError():
            return f"{place}: {one_line(str(error))}"
        case PermissionError():
            fix = "Check the credentials and what they allow"
            fix = fix if place.is_remote else "Make it readable for the user who trains"
            return f"{place if place.is_remote else error.filename or place}: no permission to read it. {fix}"
        case FileNotFoundError():
            fix = "Check the URL" if place.is_remote else "Check the path (dataset_path, tokenizer path)"
            return f"{place}: does not exist. {fix}"
        case MemoryError():
            return f"{place}: needs more memory than there is. If it is not damaged, split it into smaller files"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if place.is_remote:
        # Storage packages, and what they build on, have exceptions of their own.
        fix = "Check the file, the connection and the credentials"
    elif isinstance(error, OSError):
        fix = "Check the file and its disk"
    else:
        reason = f"{type(error).__name__}: {reason}"
        fix = "The file is damaged or not what its name says: copy it again, or leave it out"
    return f"{place}: cannot be read ({one_line(reason, _REASON_CHARS) or type(error).__name__}). {fix}"
