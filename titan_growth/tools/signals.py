"""Being asked to stop: the signal only sets a flag; the loop saves at the end of its step and leaves in good order."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Remembers the first stop signal of this process."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def is_set(self) -> bool:
        return bool(self.name)

    def install(self) -> None:
        """Handles SIGTERM, SIGUSR1 and SIGINT from now on. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
