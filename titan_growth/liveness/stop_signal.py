"""Being asked to stop: the signal only sets a flag; the loop saves at the end of its step and leaves in good order.

A time limit sets the same flag. It is counted from the launch, whose start `run_train.sh` leaves in the environment:
what a scheduler grants is for preparation, restarts and relaunches too. The clock is the monotonic one, which all
processes of a machine share and nobody can set; other machines' clocks are never looked at.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def signal_on_parent_death(number: int) -> None:
    """Asks Linux to send this process a signal when the thread that started it dies, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


LAUNCHED_VARIABLE = "TITAN_GROWTH_LAUNCHED"
"""When the launch began, in seconds of this machine's monotonic clock."""
TIME_LIMIT = "job.time_limit_seconds"

_IMPORTED = time.monotonic()


def seconds_since_launch() -> float:
    """Wall-clock since `run_train.sh` was started on this machine, else since this process was."""
    try:
        return time.monotonic() - float(os.environ[LAUNCHED_VARIABLE])
    except (KeyError, ValueError):
        return time.monotonic() - _IMPORTED


class StopSignal:
    """Remembers the first stop signal of this process, or that its time is up.

    Args:
        time_limit_seconds: `job.time_limit_seconds`; None is no limit.
        elapsed: seconds that count towards the limit.
    """

    def __init__(
        self, time_limit_seconds: int | None = None, elapsed: Callable[[], float] = seconds_since_launch
    ) -> None:
        self.name = ""
        self.time_limit_seconds = time_limit_seconds
        self._elapsed = elapsed

    @property
    def is_set(self) -> bool:
        """Ranks may find their time up at different steps: the loop lets them agree on one."""
        if not self.name and self.time_limit_seconds is not None and self._elapsed() >= self.time_limit_seconds:
            self.name = TIME_LIMIT
        return bool(self.name)

    @property
    def reason(self) -> str:
        """Why the run stops, to follow `stopped at step N and saved`; empty for a signal."""
        by_time = self.is_set and self.name == TIME_LIMIT
        return f" ({TIME_LIMIT} = {self.time_limit_seconds:,} is over)" if by_time else ""

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
