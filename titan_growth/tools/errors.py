"""The errors that users see.

Anything a user can cause (a recipe, a file, a checkpoint, a disk) is raised as a `TitanGrowthError`. Its message is the
whole report: where, what, and what to do. Entry points print it without a traceback; any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_growth.tools.text import one_line


class TitanGrowthError(Exception):
    """Base of all errors reported as a message instead of a traceback."""

    exit_status = 1
    """Exit status of `run_train.sh`: 1 failed, 2 bad recipe (nothing was started)."""


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe: the dotted key, what is wrong, and what to do."""

    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        head = f"{self.key}: {self.message}" if self.key else self.message
        return f"{head}. {self.hint}" if self.hint else head


class ConfigError(TitanGrowthError):
    """One or more problems of a recipe, reported together before anything is started."""

    exit_status = 2

    def __init__(self, problems: list[Problem] | str) -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def print_error(error: TitanGrowthError) -> int:
    """Prints an error, one line for each problem; returns the exit status."""
    problems = error.problems if isinstance(error, ConfigError) else [error]
    print("\n".join(f"error: {problem}" for problem in problems))
    return error.exit_status


class DataError(TitanGrowthError):
    """A corpus, tokenizer or prepared data that cannot be used."""

    exit_status = 2


class LocationError(TitanGrowthError):
    """A URL that cannot be used: unknown scheme, missing package, or incomplete."""

    exit_status = 2

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = message, hint
        super().__init__(f"{message}. {hint}" if hint else message)


class CheckpointError(TitanGrowthError):
    """A checkpoint that cannot be written or used. Always one line; `reason` leaves out the refused folder."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
        self.reason = str(self)


class RefusedCheckpointError(CheckpointError):
    """A folder that is not loaded, by its name or path in messages, and why."""

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(f"{folder} refused: {reason}")
        self.folder, self.reason = folder, one_line(reason)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.folder, self.reason)  # errors travel between ranks


class GrowthError(TitanGrowthError):
    """A growth whose result is not what its operator declares."""


class RunFolderError(TitanGrowthError):
    """A run folder that cannot be used: locked by another run, not writable, or full."""

    exit_status = 2


class TrainingError(TitanGrowthError):
    """Training cannot continue: a loss that is not finite, a batch without tokens."""


def require_finite(step: int, **values: float) -> None:
    """Raises TrainingError, with all values of a step, when one of them is not finite."""
    if not all(math.isfinite(value) for value in values.values()):
        found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        raise TrainingError(
            f"step {step}: {found}. Nothing was saved from here; resume from the last checkpoint with a lower "
            "optimizer.lr or a longer warmup"
        )
