"""What a thread waits for when it is not a collective: marked where it waits, read by the heartbeat.

A rank that waits for a slow disk or a save in the background stands as still as one that hangs. Nothing in its stack
tells them apart for certain, so the code that waits says it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

STORAGE = "storage"
"""A read, a write or a removal, here or in another thread: it may take long, and no other rank can help."""
LAST_SAVE = "last save"
"""The rank does no more steps; it lets a save in the background end before it says why."""

_waits: dict[int, str] = {}
"""Thread -> what it waits for."""


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Marks this thread as waiting; no collective may be inside. Also a decorator."""
    thread = threading.get_ident()
    before = _waits.get(thread, "")
    _waits[thread] = what
    try:
        yield
    finally:
        _waits[thread] = before


def wait_of(thread: int | None) -> str:
    """What a thread waits for: STORAGE, LAST_SAVE, or "" for nothing that was marked."""
    return _waits.get(thread, "") if thread is not None else ""
