"""Going back to an earlier checkpoint: because the run asks for it, or because the user does (`checkpoint.load_step`).

In the middle of a run the code that finds the need raises `RollBackError`, and the session obeys. What the run shall do
differently the second time is written into the manifest of the checkpoint that it goes back to. So a run that is killed
right afterwards, or resumed on another mesh, does the same.

A `load_step` is obeyed once: the same command, given again after a stop, must go on and not go back again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from titan_growth.checkpoint.manifest import Manifest
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.errors import TitanGrowthError
from titan_growth.tools.files import write_atomic

_DONE_FILE = "gone-back-to"
"""In the checkpoint folder: the `load_step` that the run has gone back to."""


class RollBackError(TitanGrowthError):
    """The run is to go on from an earlier checkpoint. Not for the user.

    Attributes:
        what: is taken back, for messages.
        change: the manifest of the checkpoint, as the run is to go on from it.
        source: name of the checkpoint's folder; None takes the newest good one.
    """

    def __init__(self, what: str, change: Callable[[Manifest], Manifest], source: str | None = None) -> None:
        super().__init__(f"{what} is taken back")
        self.what = what
        self.change = change
        self.source = source


def pending_load_step(section: CheckpointConfig, root: Path) -> int:
    """`checkpoint.load_step`, or -1 when the run has already gone back to that step.

    So the same command goes on when it is given again after a stop. Naming another step, or none in between, goes back
    again.
    """
    try:
        done = int((root / _DONE_FILE).read_text())
    except (OSError, ValueError):
        done = -1
    return -1 if done == section.load_step else section.load_step


def remember_load_step(load_step: int, root: Path) -> None:
    """Writes down which `load_step` the run has gone back to, or forgets it when there is none (-1)."""
    if load_step != -1:
        write_atomic(root / _DONE_FILE, f"{load_step}\n")
    else:
        (root / _DONE_FILE).unlink(missing_ok=True)
