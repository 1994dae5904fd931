"""What a thread waits for other than a collective: marked by the code that waits, read by the heartbeat.

A rank waiting for a slow disk or a background save stands as still as one that hangs, and its stack does not reliably
tell them apart.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

STORAGE = "storage"
"""A read, write or removal, in this thread or another; it may take long, and no other rank is to blame."""
LAST_SAVE = "last save"
"""The rank takes no more steps; it lets a background save finish before it reports why."""

_waits: dict[int, str] = {}
"""Thread -> what it waits for."""


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Marks this thread as waiting; must not contain a collective. Also a decorator."""
    thread = threading.get_ident()
    before = _waits.get(thread, "")
    _waits[thread] = what
    try:
        yield
    finally:
        _waits[thread] = before


def wait_of(thread: int | None) -> str:
    """What a thread waits for: STORAGE, LAST_SAVE, or "" if nothing is marked."""
    return _waits.get(thread, "") if thread is not None else ""
