"""How much memory this process may still take."""

from __future__ import annotations

import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that can be had without swapping, in bytes, within the container's limit; None where nothing tells."""
    found = [bytes for bytes in (_of_machine(), _of_container()) if bytes is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _of_container() -> int | None:
    """What a limit of cgroup v2 leaves. Its page cache counts as used there, and can be had."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
        return int(limit) - int(used) + (int(cached[1]) if cached else 0)
    except (OSError, ValueError):  # no such files, or no limit ("max")
        return None
