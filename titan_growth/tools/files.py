"""Files and folders on disk or by URL, written so that a reader or a power cut never sees half of one.

A `UPath` (tools/location.py) has the methods of a `Path`, but object stores have no renames and no free space, and an
object appears in them whole. Only this module knows the difference.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from titan_growth.tools.location import is_remote

_COPIES_AT_ONCE = 8


def write_atomic(path: Path, data: str | bytes) -> None:
    """Creates or replaces a file atomically (by URL, as far as the store does). Text is UTF-8.

    Raises:
        OSError: when it cannot be written. The file is then unchanged, and no temporary one is left.
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
    """Makes the names in a folder durable; by URL they are."""
    if is_remote(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises OSError when that cannot be told: `Path.is_dir` answers no."""
    if is_remote(path):
        return path.is_dir()
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def free_bytes(folder: Path) -> int | None:
    """Free space on the disk of a folder; None by URL."""
    return None if is_remote(folder) else shutil.disk_usage(folder).free


def remove_folder(folder: Path) -> None:
    """Removes a folder and everything in it. Raises OSError when a part cannot be removed."""
    if not is_remote(folder):
        shutil.rmtree(folder)
        return
    for path in list(folder.iterdir()):
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, NotImplementedError):
        # Without files a store has no folder; packages report that differently.
        folder.rmdir()


def free_name(path: Path) -> Path:
    """The path, or the first of `name-2`, `name-3`, ... that nothing has."""
    target, number = path, 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}-{number}")
    return target


def move_folder(folder: Path, target: Path) -> None:
    """Renames a folder of files. By URL the files are copied, then removed, and an OSError may come in between."""
    if not is_remote(folder):
        folder.rename(target)
        return
    target.mkdir(parents=True, exist_ok=True)
    files: list[Any] = list(folder.iterdir())
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as threads:
        list(threads.map(lambda path: path.fs.copy(path.path, (target / path.name).path), files))
    remove_folder(folder)
