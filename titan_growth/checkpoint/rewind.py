"""Going back to an earlier checkpoint, on the run's own account or the user's (`checkpoint.load_step`).

Mid-run, code that has to go back raises `RollBackError` and the session does it. What the run must do differently the
second time is written into the manifest of the checkpoint it goes back to, so a run killed right afterwards, or resumed
on another mesh, does the same.

A `load_step` is obeyed once: the same command after a stop must continue, not go back again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from titan_growth.checkpoint.manifest import Manifest
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.errors import TitanGrowthError
from titan_growth.tools.files import write_atomic

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
    """
    try:
        done = int((root / _DONE_FILE).read_text())
    except Exception:  # nothing there, or a store that does not answer, as the search will say
        done = -1
    return -1 if done == section.load_step else section.load_step


def remember_load_step(load_step: int, root: Path) -> None:
    """Records the `load_step` obeyed, or clears the record when there is none (-1)."""
    if load_step != -1:
        write_atomic(root / _DONE_FILE, f"{load_step}\n")
    else:
        (root / _DONE_FILE).unlink(missing_ok=True)
