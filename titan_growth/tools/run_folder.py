"""The run folder: created, checked and locked.

The lock keeps two runs out of one folder. It is an advisory lock on an open file, so it ends with the process, however
that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from titan_growth.tools.errors import RunFolderError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.location import local_path
from titan_growth.tools.text import gib

RECIPE_FILE = "recipe.toml"
METRICS_FILE = "metrics.jsonl"
LAYERS_FILE = "layers.jsonl"


class RunFolder:
    """A run's `job.dump_folder`."""

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path).absolute()
        self._lock: IO[str] | None = None

    def require_no_file(self) -> None:
        """Raises RunFolderError when a file is where the folder, or one of its parents, has to be."""
        for path in (self.path, *self.path.parents):
            if os.path.isfile(path):  # False where that cannot be told: `create` says why
                which = "it" if path == self.path else str(path)
                raise self._error(f"{which} is a file. Remove it, or name another folder")

    def create(self) -> None:
        """Makes the folder. Raises RunFolderError when it cannot be made or written to."""
        self.require_no_file()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise self._error(f"cannot be written to ({reason}). Name another folder, or make room in it") from None

    def lock(self) -> None:
        """Takes the folder for this process. Raises RunFolderError when another run has it, or it has no locks."""
        path = self.path / ".lock"
        with contextlib.ExitStack() as closed_on_errors:
            try:
                file = closed_on_errors.enter_context(open(path, "a+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = path.read_text().strip() or "another process"
                raise self._error(f"in use by {owner}. Wait for that run, or name another folder") from None
            except OSError as error:
                raise self._error(
                    f"cannot be locked ({error.strerror or error}). "
                    "Remove .lock from it if that is not a plain file, or name a folder on a file system that has locks"
                ) from None
            closed_on_errors.pop_all()  # closing it would give up the lock
        file.seek(0)
        file.truncate()
        with contextlib.suppress(OSError):  # a full disk: the owner's name is only for the other run's message
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
        self._lock = file

    def _error(self, message: str) -> RunFolderError:
        return RunFolderError(f"job.dump_folder {self.path}: {message}")

    def unlock(self) -> None:
        """Releases the folder."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.close()
            self._lock = None

    def require_space(self, num_bytes: int, what: str) -> None:
        """Raises RunFolderError when fewer than `num_bytes` are free."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            needs = f"{what} needs {gib(num_bytes)}, but only {gib(free)} are free"
            raise self._error(f"{needs}. Make room, or name another folder")

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file of the folder atomically. Raises RunFolderError when it cannot be written."""
        try:
            write_atomic(self.path / name, text)
        except OSError as error:
            raise RunFolderError(
                f"{self.path / name}: cannot be written ({error.strerror or error}). Make room, or remove what is there"
            ) from None
