"""The cache of derived data, written so that a crash never leaves a wrong file.

Everything in it can be made again, so the rules are few: a file that marks something complete appears in one step
(`write_atomic`), one process makes it while others wait (`exclusive`), and a full or read-only disk is reported with
the way out (`writing`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from titan_growth.tools.errors import DataError
from titan_growth.tools.location import is_remote, local_path
from titan_growth.tools.logs import logger

CACHE_VARIABLE = "TITAN_GROWTH_CACHE"
_SECONDS_BEFORE_LOGGING_A_WAIT = 5.0


def cache_root(cache_dir: Path | None = None) -> Path:
    """The cache folder, created if need be.

    `cache_dir` if given, else $TITAN_GROWTH_CACHE, else $XDG_CACHE_HOME/titan_growth, else ~/.cache/titan_growth.
    Raises DataError if the folder cannot be created.
    """
    variable = os.environ.get(CACHE_VARIABLE, "")
    if cache_dir is None and is_remote(variable):
        place = f"{CACHE_VARIABLE}: {variable}"
        raise DataError(f"{place} is a URL, but prepared data is memory-mapped from a disk. Name a folder")
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "titan_growth")
    root = local_path(cache_dir or variable or default).absolute()
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any OSError while writing at `path` into a DataError that names the way out."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cache {path}: cannot be written ({error.strerror or error}). "
            f"Set data.cache_dir or the environment variable {CACHE_VARIABLE} to a writable folder with enough space"
        ) from error


@contextlib.contextmanager
def exclusive(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock file `path`; a wait of more than a few seconds is logged once."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_SECONDS_BEFORE_LOGGING_A_WAIT)
        except Timeout:
            logger.info("waiting for another process to finish %s (lock: %s)", purpose, path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
