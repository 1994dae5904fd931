"""Files of a checkpoint that may be a stranger's: plain names, plain files, and no more read than was expected."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import IO, Any, TypeGuard

from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.liveness.waits import STORAGE, waiting_for

MAX_METADATA_BYTES = 1 << 30
"""Of a `.metadata`: seven million pieces. Reading takes some ten times as much memory."""
MAX_TEXT_BYTES = 64 << 20
"""Of a manifest, a recipe, a lineage. The manifest of ten thousand ranks has two."""


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the folder itself, on every system: no path, no device, no control sign."""
    return (
        0 < len(name) <= 255
        and name.isprintable()
        and name == name.strip()
        and not name.endswith(".")
        and not any(mark in name for mark in '/\\:*?"<>|')
    )


def size_of_file(path: Path) -> int | None:
    """Bytes of a plain file; None when there is none of this name, or something else.

    Raises:
        RefusedError: when it is a link to somewhere else.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise RefusedError(f"{path.name} is a link to another folder")
    return found.st_size


def open_plain(path: Path) -> IO[bytes]:
    """A plain file for reading, without waiting for anybody.

    Raises:
        FileNotFoundError: when there is none of this name.
        RefusedError: when it is something else (a pipe would never end), or a link to somewhere else.
    """
    if size_of_file(path) is None:
        path.stat()
        raise RefusedError(f"{path.name} is no file")
    return path.open("rb")


@waiting_for(STORAGE)
def read_plain(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a plain file.

    Raises:
        FileNotFoundError, RefusedError: as `open_plain`; RefusedError also when it has more bytes.
    """
    size = size_of_file(path)
    if size is not None and size > max_bytes:
        raise RefusedError(f"{path.name} has more than {max_bytes:,} bytes")
    with open_plain(path) as file:
        return file.read(size or 0)  # and no more: room is made for all that is asked for


def is_count(value: Any) -> TypeGuard[int]:
    """Whether something read is a number of bytes or elements."""
    return type(value) is int and 0 <= value < 1 << 63
