"""Going back to an earlier checkpoint, on the run's own account or the user's (`checkpoint.load_step`).

Mid-run, code that has to go back raises `RollBackError` and the session does it. What the run must do differently the
second time is written into the manifest of the checkpoint it goes back to, so a run killed right afterwards, or resumed
on another mesh, does the same.

A `load_step` is obeyed once, and so is `start_fresh`: the same command after a stop must continue, not go back again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from titan_growth.checkpoint.ledger import read_ledger
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.errors import CheckpointError, TitanGrowthError
from titan_growth.tools.files import free_name, write_atomic

_DONE_FILE = "gone-back-to"
"""In the checkpoint folder: the `load_step` already obeyed."""


class RollBackError(TitanGrowthError):
    """Asks the session to roll back to an earlier checkpoint. Never shown to the user.

    Attributes:
        what: is rolled back, for messages.
        change: makes the manifest to continue from out of the checkpoint's.
        source: name of the checkpoint's folder; None takes the newest valid one.
    """

    def __init__(self, what: str, change: Callable[[Manifest], Manifest], source: str | None = None) -> None:
        super().__init__(f"{what} is rolled back")
        self.what = what
        self.change = change
        self.source = source


def pending_load_step(section: CheckpointConfig, root: Path) -> int:
    """`checkpoint.load_step`, or -1 if the run has already obeyed it.

    Another step, or a launch without one in between, makes it go back again.

    Raises:
        CheckpointError: when that cannot be told.
    """
    if section.load_step == -1:
        return -1
    path = root / _DONE_FILE
    try:
        done = int(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return section.load_step
    except Exception as error:  # stores have errors of their own
        raise CheckpointError(
            f"checkpoint.load_step: whether the run has gone back to step {section.load_step} before cannot be told, "
            f"because {path} cannot be read ({error}). Remove it to go back, or leave load_step out to go on"
        ) from None
    return -1 if done == section.load_step else section.load_step


def pending_fresh_start(section: CheckpointConfig, root: Path) -> bool:
    """Whether to obey `checkpoint.start_fresh`, as `pending_load_step`: once.

    Raises:
        CheckpointError: when that cannot be told.
    """
    if not section.start_fresh:
        return False
    try:
        ledger = read_ledger(root)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint.start_fresh: whether the run in {root} has started afresh before cannot be told: {error}. "
            "Remove that file to start from scratch, or leave start_fresh out to go on"
        ) from None
    return ledger is None or not ledger.started_fresh


def remember_load_step(load_step: int, root: Path) -> None:
    """Records the `load_step` obeyed, or clears the record when there is none (-1)."""
    path = root / _DONE_FILE
    if load_step != -1:
        write_atomic(path, f"{load_step}\n")
    elif path.is_dir():
        path.rename(free_name(root / f"damaged-{_DONE_FILE}"))
    else:
        path.unlink(missing_ok=True)
