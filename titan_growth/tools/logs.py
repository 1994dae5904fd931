"""The package's logger: rank 0 logs everything, other ranks only warnings and errors."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

logger = logging.getLogger("titan_growth")


class _RankFormatter(logging.Formatter):
    """`12:03:44  message`, with the level above INFO and the rank other than 0."""

    def __init__(self, rank: int) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        rank = f"rank {self.rank}: " if self.rank else ""
        return f"{self.formatTime(record, self.datefmt)}  {rank}{level}{record.getMessage()}"


class _Handler(logging.StreamHandler):
    """Drops a line that cannot be written (a full disk, a closed pipe) without a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def say(message: str) -> None:
    """Prints to standard error. Never fails: the exit report has to follow."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def setup_logging(rank: int | None = None) -> None:
    """Logs to standard output, warnings too, so that their order is kept."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    handler = _Handler(sys.stdout)
    handler.setFormatter(_RankFormatter(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
