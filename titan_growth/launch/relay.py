"""Passes signals on to the ranks.

Torchrun puts every rank in its own session, so Ctrl-C and a scheduler's signals reach only the launcher. Without ranks,
a signal ends the launch at once: there is nothing to lose.

Ranks get SIGTERM: one that is still importing torch then ends silently, where SIGINT would print a traceback. SIGUSR1,
a scheduler's early warning, is passed on as it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
INTERRUPTS_THAT_KILL = 3


class Interrupted(BaseException):
    """A signal arrived while no rank was running. Not an `Exception`, so that nothing swallows it."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        super().__init__(self.name)


class SignalRelay:
    """Handles this process's signals while installed, and remembers them."""

    def __init__(self) -> None:
        self.stopped_by = ""
        self.killed = False
        self._interrupts = 0
        self._owner = os.getpid()

    @contextlib.contextmanager
    def installed(self) -> Iterator[SignalRelay]:
        """Handles signals inside the block."""
        # Signals ignored on purpose (nohup, a shell's background job) stay ignored.
        numbers = [number for number in HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked child, such as a data worker of the preflight, inherits the handler but has no ranks.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.stopped_by = self.stopped_by or signal.Signals(number).name
        ranks = rank_processes()
        if not ranks:
            raise Interrupted(number)
        forwarded = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == INTERRUPTS_THAT_KILL:
                self.killed = True
                forwarded = signal.SIGKILL
            elif self._interrupts == INTERRUPTS_THAT_KILL - 1:
                # os.write: the signal may have interrupted a print.
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"Ctrl-C once more stops without saving\n")
        signal_ranks(ranks, forwarded)


def signal_ranks(ranks: list[int], number: int) -> None:
    """Sends a signal to each rank. Only a kill goes to its whole session: a rank that saves needs its data workers."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(rank, number)
            else:
                os.kill(rank, number)


def rank_processes() -> list[int]:
    """Process ids of the ranks: the children that lead a session, as only torchrun's do."""
    ranks = []
    for pid in _children():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == pid:
                ranks.append(pid)
    return ranks


def _children() -> list[int]:
    me = os.getpid()
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        pairs = [line.split() for line in listing.splitlines()]
        return [int(pair[0]) for pair in pairs if len(pair) == 2 and pair[1] == str(me)]
    children = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                # The command's name may hold spaces and brackets; state and parent follow its last bracket.
                state, parent = stat.rpartition(")")[2].split()[:2]
                if int(parent) == me and state != "Z":
                    children.append(int(entry))
    return children
