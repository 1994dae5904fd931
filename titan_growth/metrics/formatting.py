"""Numbers as text for people: durations, rates, and the console's colours."""

from __future__ import annotations

import math

COLORS = {
    "blue": "\x1b[34m",
    "cyan": "\x1b[36m",
    "green": "\x1b[32m",
    "magenta": "\x1b[35m",
    "yellow": "\x1b[33m",
    "end": "\x1b[0m",
}
"""Terminal codes; `end` switches back to the default colour."""


def format_duration(seconds: float) -> str:
    """Two units at most: `9s`, `2m10s`, `3h05m`, `2d04h`; under a second `0.3s`; `?` for what is not a duration."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if 0 < seconds < 0.95:
        return f"{seconds:.1f}s"
    # Round once, here: rounding each unit by itself gives "1m60s".
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    # Longer durations are truncated, so that they are never overstated.
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_rate(per_second: float) -> str:
    """FLOPs per second with three digits and the fitting prefix: `731 GFLOP/s`, `989 TFLOP/s`."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        # 999.5 and up would print as 1000 in the smaller unit.
        if per_second >= scale * 0.9995:
            return f"{per_second / scale:.3g} {prefix}FLOP/s"
    return f"{per_second:.3g} FLOP/s"
