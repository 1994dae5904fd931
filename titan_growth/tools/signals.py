"""Being asked to stop: the signal only sets a flag; the loop saves at the end of its step and leaves in good order."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def signal_on_parent_death(number: int) -> None:
    """Asks Linux to send this process a signal when the thread that started it dies, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Remembers the first stop signal of this process."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def is_set(self) -> bool:
        return bool(self.name)

    def install(self) -> None:
        """Handles SIGTERM, SIGUSR1 and SIGINT from now on. Main thread only.

        Under torchrun the death of the launcher counts as a SIGTERM: ranks that nobody waits for save and leave.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal_on_parent_death(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
