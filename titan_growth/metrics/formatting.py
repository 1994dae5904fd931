"""Metrics as text for people: durations, rates and the console's three kinds of lines.

Kept apart from the sinks because the closing summary speaks the same language. Nothing here adds colour except where
asked to: `paint` is the identity unless `color` is true, so a line reads the same on a terminal and in a file.
"""

from __future__ import annotations

import math

from titan_growth.metrics.records import GrowthRecord, StepRecord, Timings, ValidationRecord

_RESET = "\x1b[0m"
_CODES = {"blue": "\x1b[34m", "cyan": "\x1b[36m", "green": "\x1b[32m", "magenta": "\x1b[35m", "yellow": "\x1b[33m"}


def paint(text: str, name: str, color: bool) -> str:
    """`text` in the terminal colour `name` when `color` is true, else unchanged."""
    return f"{_CODES[name]}{text}{_RESET}" if color else text


def format_duration(seconds: float) -> str:
    """Two units at most: `9s`, `2m10s`, `3h05m`, `2d04h`; under a second `0.3s`; `?` for what is not a duration."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if 0 < seconds < 0.95:
        return f"{seconds:.1f}s"
    # Rounded once, here: rounding each unit by itself is how "1m60s" comes about.
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    # From an hour on the last shown unit is minutes, then hours: cut, so that a longer unit is never overstated.
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_rate(per_second: float) -> str:
    """FLOPs per second with three digits and the fitting prefix: `731 GFLOP/s`, `989 TFLOP/s`."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        # 999.5 and up would print as 1000 in the smaller unit; the next unit then reads better.
        if per_second >= scale * 0.9995:
            return f"{per_second / scale:.3g} {prefix}FLOP/s"
    return f"{per_second:.3g} FLOP/s"


def step_line(record: StepRecord, timings: Timings, color: bool = False) -> str:
    """The console's line of one training step."""
    total = timings.step_total
    share = 100.0 * record.step / total if total > 0 else 0.0
    return "  ".join(
        [
            paint(f"step {record.step}/{total}", "cyan", color),
            f"{share:.1f}%",
            paint(f"loss {record.loss:.4f}", "green", color),
            f"grad_norm {record.grad_norm:.4f}",
            f"lr {record.lr:.2e}",
            paint(f"{record.tokens_per_second:,.0f} tok/s", "blue", color),
            paint(f"mfu {100.0 * record.mfu:.1f}%", "magenta", color),
            f"mem {timings.memory_gib:.2f} GiB",
            f"flops {record.flops:.2e}",
            f"eta {format_duration(timings.eta_seconds)}",
        ]
    )


def validation_line(record: ValidationRecord, color: bool = False) -> str:
    """The console's line of one validation."""
    loss = paint(f"validation loss {record.validation_loss:.4f}", "yellow", color)
    return f"{loss}  at step {record.step}  tokens {record.tokens:,}  flops {record.flops:.2e}"


def growth_line(record: GrowthRecord, color: bool = False) -> str:
    """The console's line of one growth."""
    head = paint(f"grown {record.from_layers} -> {record.to_layers} layers at step {record.step}", "magenta", color)
    return f"{head}: loss {record.loss_before:.2f} before, {record.loss_after:.2f} after (same held-out batch)"
