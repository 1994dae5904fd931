"""Files and folders, written so that no reader, and no power cut, ever sees half of one; on this machine or by URL.

A `UPath` (tools/location.py) has the methods of a `Path`, but a store of objects has neither renames nor a disk that
could be full, and an object appears in it when it is whole. What is different is all in here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from titan_growth.tools.location import is_remote

_COPIES_AT_ONCE = 8


def write_atomic(path: Path, data: str | bytes) -> None:
    """Makes or replaces a file in one step: at every instant it is as it was before, or whole. Text is UTF-8.

    By URL that holds as far as the store keeps it: those of objects do.

    Raises:
        OSError: when it cannot be written; the file is then as it was, and nothing is left beside it.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, too; by URL they are."""
    if is_remote(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int | None:
    """Room on the disk of a folder; None by URL, where nothing says."""
    return None if is_remote(folder) else shutil.disk_usage(folder).free


def remove_folder(folder: Path) -> None:
    """Removes a folder and all that is in it.

    Raises:
        OSError: when a part of it cannot be removed.
    """
    if not is_remote(folder):
        shutil.rmtree(folder)
        return
    for path in list(folder.iterdir()):
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, NotImplementedError):
        # Without files, a store has no folder any more; packages disagree about what to say then.
        folder.rmdir()


def move_folder(folder: Path, target: Path) -> None:
    """Gives a folder of files another name beside it. By URL the files are copied, and then removed.

    Raises:
        OSError: when it cannot be done; by URL a part may have been.
    """
    if not is_remote(folder):
        folder.rename(target)
        return
    target.mkdir(parents=True, exist_ok=True)

    def copy(path: Any) -> None:
        path.fs.copy(path.path, (target / path.name).path)

    with ThreadPoolExecutor(_COPIES_AT_ONCE) as threads:
        list(threads.map(copy, list(folder.iterdir())))
    remove_folder(folder)
