"""Files of an untrusted checkpoint: plain names, regular files, bounded reads."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import IO, Any, TypeGuard

from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.liveness.waits import STORAGE, waiting_for

MAX_METADATA_BYTES = 1 << 30
"""Of a `.metadata`: seven million pieces. Parsing takes about ten times as much memory."""
MAX_TEXT_BYTES = 64 << 20
"""Of a manifest, recipe or lineage. The manifest of 10,000 ranks has 2 MiB."""


def is_plain_name(name: str) -> bool:
    """Whether a name is a file in the folder itself, on every OS: no path, device or control character."""
    return (
        0 < len(name) <= 255
        and name.isprintable()
        and name == name.strip()
        and not name.endswith(".")
        and not any(mark in name for mark in '/\\:*?"<>|')
    )


def size_of_file(path: Path) -> int | None:
    """Size of a regular file; None if there is nothing.

    Raises:
        OSError: if that cannot be told.
        RefusedError: if it is not a regular file, or a link to another folder.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        raise RefusedError(f"{path.name} is not a file")
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise RefusedError(f"{path.name} is a link to another folder")
    return found.st_size


def open_plain(path: Path) -> IO[bytes]:
    """Opens a regular file for reading; never blocks.

    Raises:
        FileNotFoundError: if it is missing.
        RefusedError: if it is not a regular file (a pipe would never end), or a link to another folder.
    """
    size_of_file(path)
    return path.open("rb")


@waiting_for(STORAGE)
def read_plain(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError, RefusedError: as `open_plain`; RefusedError also if it is larger than `max_bytes`.
    """
    size = size_of_file(path)
    if size is not None and size > max_bytes:
        raise RefusedError(f"{path.name} has more than {max_bytes:,} bytes")
    with open_plain(path) as file:
        return file.read(size or 0)  # no more: read() allocates all that is asked for


def text_of(path: Path) -> str | None:
    """The text of a regular file; None if there is nothing. Raises RefusedError if there is, and it cannot be read."""
    try:
        return read_plain(path).decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(str(getattr(error, "strerror", None) or error)) from None


def read_into(file: IO[bytes], target: Any) -> bool:
    """Fills a byte array from a file; returns False if the file ends first."""
    left = memoryview(target)
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            return False
        left = left[count:]
    return True


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a parsed value is a number of bytes or elements."""
    return type(value) is int and 0 <= value < 1 << 63
