"""Where a command writes a folder: a new one, with room for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from titan_growth.checkpoint.saving import cause_of
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, TitanGrowthError
from titan_growth.tools.text import gib


def require_new(target: Path, source: Path) -> None:
    """Raises ConfigError unless `--to` names a folder that is empty or not there, and not inside of `--from`."""
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ConfigError([Problem("--to", f"{target} is inside the source", "Name another folder")])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError([Problem("--to", f"{target} is not empty", "Name a folder that does not exist")])


def require_space(target: Path, num_bytes: int, what: str) -> None:
    """Makes the folder, and raises CheckpointError when so much does not fit there.

    Raises:
        OSError: when it cannot be made.
    """
    target.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target).free) < num_bytes:
        raise CheckpointError(f"{target}: {what} needs {gib(num_bytes)}, but only {gib(free)} are free")


def failure(target: Path, error: BaseException) -> TitanGrowthError:
    """The one error that matters of one that DCP may have wrapped, as a message about the target."""
    error = cause_of(error, OSError, TitanGrowthError)
    if isinstance(error, TitanGrowthError):
        return error
    # torch's archive writer notices that bytes are missing but not why.
    text = str(error).strip().split("\n")[0] or type(error).__name__
    reason = error.strerror or text if isinstance(error, OSError) else f"a write failed; is the disk full? ({text})"
    return CheckpointError(f"{target}: {reason}. Nothing was committed")


def emptied(target: Path) -> None:
    """Removes the files of a command that has failed; there were none before it."""
    for file in target.iterdir() if target.is_dir() else ():
        file.unlink(missing_ok=True)
