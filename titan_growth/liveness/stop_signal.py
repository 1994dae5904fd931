"""Stop requests: a signal only sets a flag; the loop saves at the end of the step and exits cleanly.

A time limit sets the same flag. It counts from the launch, whose start `run_train.sh` puts into the environment, since
a scheduler's limit covers preparation, restarts and relaunches too. It uses the monotonic clock, which all processes of
a machine share and nobody can set; other machines' clocks are never used.
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
    """Asks Linux to signal this process when the thread that started it dies, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


LAUNCHED_VARIABLE = "TITAN_GROWTH_LAUNCHED"
"""Start of the launch on this machine's monotonic clock, in seconds."""
TIME_LIMIT = "job.time_limit_seconds"

_IMPORTED = time.monotonic()


def seconds_since_launch() -> float:
    """Seconds since `run_train.sh` started on this machine, else since this process did."""
    try:
        return time.monotonic() - float(os.environ[LAUNCHED_VARIABLE])
    except (KeyError, ValueError):
        return time.monotonic() - _IMPORTED


class StopSignal:
    """Holds the first stop signal of this process, or the expiry of its time limit.

    Args:
        time_limit_seconds: `job.time_limit_seconds`; None for no limit.
        elapsed: returns the seconds that count towards the limit.
    """

    def __init__(
        self, time_limit_seconds: int | None = None, elapsed: Callable[[], float] = seconds_since_launch
    ) -> None:
        self.name = ""
        self.time_limit_seconds = time_limit_seconds
        self._elapsed = elapsed

    @property
    def is_set(self) -> bool:
        """Whether to stop. Ranks may reach the limit at different steps; the loop makes them agree on one."""
        if not self.name and self.time_limit_seconds is not None and self._elapsed() >= self.time_limit_seconds:
            self.name = TIME_LIMIT
        return bool(self.name)

    @property
    def reason(self) -> str:
        """The suffix of `stopped at step N and saved`; empty for a signal."""
        by_time = self.is_set and self.name == TIME_LIMIT
        return f" ({TIME_LIMIT} = {self.time_limit_seconds:,} is over)" if by_time else ""

    def install(self) -> None:
        """Installs handlers for SIGTERM, SIGUSR1 and SIGINT. Main thread only.

        Under torchrun the launcher's death counts as a SIGTERM: orphaned ranks save and exit.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal_on_parent_death(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
