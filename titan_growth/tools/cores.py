"""How many cores there are for this process."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that this process may use: a container or scheduler may allow fewer than the machine has."""
    # macOS cannot tell.
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, len(allowed))
