"""(h) of the growth study: how high the training loss jumps at a growth, and after how many tokens it is back."""

from __future__ import annotations

import statistics
from typing import Any

_WINDOW = 5
"""Logged losses that are averaged: 50 steps of 4,096 tokens."""


def spikes(ends: list[dict[str, Any]]) -> list[str]:
    """A table of the growths of all ends, one of each kind: the first seed's."""
    rows: dict[str, str] = {}
    for entry in ends:
        for growth in entry["growths"]:
            if row := _row(growth, entry["tokens"] // entry["end"]):
                rows.setdefault(f"{entry['arm']}, step {growth['step']:,}", row)
    if not rows:
        return []
    head = ["| growth | loss before | highest after | jump | back after |", "| --- | --- | --- | --- | --- |"]
    return [
        f"Training losses of the first seed, each a mean of {_WINDOW} logged ones (every 10 steps); the highest after "
        "is of a single step. *Back* is the first mean at or below the one before the growth.",
        "\n".join([*head, *(f"| {name} | {row} |" for name, row in rows.items())]),
    ]


def _row(growth: dict[str, Any], tokens_per_step: int) -> str | None:
    before = [loss for step, loss in growth["losses"] if step <= growth["step"]][-_WINDOW:]
    after = [(step, loss) for step, loss in growth["losses"] if step > growth["step"]]
    if len(before) < _WINDOW or len(after) < _WINDOW:
        return None
    level, top = statistics.mean(before), max(loss for _, loss in after)
    means = [
        (after[index][0], statistics.mean(loss for _, loss in after[index - _WINDOW + 1 : index + 1]))
        for index in range(_WINDOW - 1, len(after))
    ]
    back = next((step for step, mean in means if mean <= level), None)
    steps = f"{(back - growth['step']) * tokens_per_step:,} tokens" if back else "not within what was kept"
    return f"{level:.3f} | {top:.3f} | {top - level:+.3f} | {steps}"
