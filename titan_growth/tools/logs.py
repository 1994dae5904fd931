"""One logger for the whole package: rank 0 says what happens, the other ranks only what goes wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

logger = logging.getLogger("titan_growth")


class _RankFormatter(logging.Formatter):
    """`12:03:44  message`; warnings and errors say so, and ranks other than 0 name themselves."""

    def __init__(self, rank: int) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        rank = f"rank {self.rank}: " if self.rank else ""
        return f"{self.formatTime(record, self.datefmt)}  {rank}{level}{record.getMessage()}"


class _Handler(logging.StreamHandler):
    """Loses a line that cannot be written (a full disk, a closed pipe) instead of printing a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def say(message: str) -> None:
    """Prints an error on standard error. Never fails: what follows, above all the exit report, must still happen."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def setup_logging(rank: int | None = None) -> None:
    """Sends the package's log to standard output (warnings too, so that order is kept)."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    handler = _Handler(sys.stdout)
    handler.setFormatter(_RankFormatter(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
