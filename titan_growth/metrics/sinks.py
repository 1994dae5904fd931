"""Where records go: the `Sink` protocol, the durable file and the console (see `boards` for TensorBoard and W&B).

A sink belongs to one process and talks to no other rank.

`metrics.jsonl` must read as one unbroken run. A run killed after its last checkpoint leaves lines of steps that the
resumed run repeats, so a checkpoint stores the file's length (`JsonlSink.offset`) and a resume cuts the file back to
it. A fresh run moves an older run's lines aside.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from titan_growth.metrics.records import Record
from titan_growth.tools.errors import RunFolderError
from titan_growth.tools.logs import logger


class Sink(Protocol):
    """Takes records in order. `close()` is called once, after the last."""

    def record(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends every record to `path` as one JSON line, written to the operating system before the call returns.

    `resume_offset` decides what happens to an existing file:

    - None, a fresh run: an older run's lines are moved to `<name>.old-K`, K the smallest free number.
    - bytes, a resumed run: the file is cut back to that length. A file that is missing, shorter, or has no line end
      there keeps its whole lines before that point, with a warning.

    Raises:
        RunFolderError: the file cannot be opened, moved, cut or written (permission, no space left).
        ValueError: `resume_offset` is negative.
    """

    def __init__(self, path: str | Path, resume_offset: int | None = None) -> None:
        if resume_offset is not None and resume_offset < 0:
            raise ValueError(f"resume_offset must not be negative, got {resume_offset}")
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_offset is None:
                self._move_aside()
            # Unbuffered, so that a full disk fails the write and not a later close().
            # "a+" because cutting back reads the bytes before the cut.
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (lives as long as the sink)
            if resume_offset is not None:
                self._cut_back(resume_offset)
            self._offset = self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._unusable(error) from error

    @property
    def offset(self) -> int:
        """Length of the file in bytes: stored in checkpoints, cut back to on resume."""
        return self._offset

    def record(self, record: Record) -> None:
        left = memoryview(f"{record.to_line()}\n".encode())
        length = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._drop_torn_line()
            raise self._unusable(error) from error
        self._offset += length

    def close(self) -> None:
        self._file.close()

    def _drop_torn_line(self) -> None:
        """Removes the partial line after a failed write; if that fails too, a resume will."""
        try:
            self._file.truncate(self._offset)
        except OSError:
            logger.warning("%s may end in the middle of a line", self.path)

    def _move_aside(self) -> None:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return
        number = 1
        while os.path.lexists(f"{self.path}.old-{number}"):
            number += 1
        aside = Path(f"{self.path}.old-{number}")
        self.path.rename(aside)
        logger.info("%s holds an older run: moved to %s", self.path, aside.name)

    def _cut_back(self, resume_offset: int) -> None:
        size = self._file.seek(0, os.SEEK_END)
        keep = self._end_of_last_line(min(size, resume_offset))
        if keep < resume_offset:
            logger.warning(
                "%s has %d whole bytes of the %d that the checkpoint counted: lines of earlier steps are missing",
                self.path,
                keep,
                resume_offset,
            )
        if keep < size:
            self._file.truncate(keep)

    def _end_of_last_line(self, end: int) -> int:
        """The last position up to `end` that directly follows a line end; 0 if there is none."""
        if end == 0:
            return 0  # an empty file cannot be mapped
        with mmap.mmap(self._file.fileno(), end, access=mmap.ACCESS_READ) as text:
            return text.rfind(b"\n") + 1

    def _unusable(self, error: OSError) -> RunFolderError:
        reason = error.strerror or str(error)
        return RunFolderError(
            f"{self.path}: cannot write metrics: {reason}. Free space or fix the permissions of the run's folder, then "
            "start the same command again to resume"
        )


class ConsoleSink:
    """One line per record through the logger `titan_growth` at INFO.

    Colour needs every handler of the logger to write to a terminal, or a log file would fill with escape codes. It is
    off when `disable_color` is true, NO_COLOR is set and not empty, or TERM is `dumb`.
    """

    def __init__(self, disable_color: bool = False) -> None:
        self._may_color = not disable_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def record(self, record: Record) -> None:
        # Colour is decided per line: handlers may be added (or a stream replaced) after the sink was built.
        logger.info("%s", record.console_line(self._may_color and _all_terminals()))

    def close(self) -> None:
        for handler in _handlers_reached():
            handler.flush()


def _handlers_reached() -> list[logging.Handler]:
    """Handlers that get our logger's records: its own, and its parents' while they propagate."""
    handlers: list[logging.Handler] = []
    node: logging.Logger | None = logger
    while node is not None:
        handlers += node.handlers
        node = node.parent if node.propagate else None
    return handlers


def _all_terminals() -> bool:
    # Nothing configured: logging's last resort writes to standard error.
    streams: list[Any] = [getattr(handler, "stream", None) for handler in _handlers_reached()] or [sys.stderr]
    try:
        return all(stream.isatty() for stream in streams)
    except (AttributeError, ValueError):  # no such method, or a closed stream
        return False
