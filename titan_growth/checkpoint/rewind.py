"""Going back to an earlier checkpoint in the middle of a run: whoever finds the need raises, `train.run` obeys.

What the run shall do differently the second time is written into the manifest of the checkpoint that it goes back to.
So a run that is killed right afterwards, or resumed on another mesh, does the same.
"""

from __future__ import annotations

from collections.abc import Callable

from titan_growth.checkpoint.folder import Manifest
from titan_growth.tools.errors import TitanGrowthError


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
