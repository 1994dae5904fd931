"""Frontiers of annealed ends: what a recipe reaches at several budgets, and what another one needs for the same.

A point within a run is at a high learning rate; its loss says little about what a run that ended there would have
reached. So each run counts by its end alone, several runs of one recipe at different budgets are a *side*, and a line
is fitted through each side's ends: loss over the logarithm of the cost, by least squares. The speedup of a side is the
horizontal distance at each of its own ends: the baseline's cost for that loss, by its line, over the cost of the end,
minus one. A loss beyond the baseline's ends is extrapolated, and marked so.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titan_growth.metrics.curves import COSTS, Curve, Point
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.run_folder import METRICS_FILE
from titan_growth.tools.text import many

ANNEALED = 0.25
"""Largest share of the peak learning rate with which a run counts as annealed."""


class Line(NamedTuple):
    """loss = level - slope * ln(cost)."""

    level: float
    slope: float
    deviation: float
    """Root mean square of the distances of the ends from it, in nats."""

    def loss_at(self, cost: float) -> float:
        return self.level - self.slope * math.log(cost)

    def cost_at(self, loss: float) -> float:
        return math.exp((self.level - loss) / self.slope)


@dataclass(frozen=True)
class Side:
    """Runs of one recipe that ended at different budgets."""

    name: str
    ends: tuple[Point, ...]
    """In the order of their FLOPs."""

    @classmethod
    def of(cls, name: str, curves: Sequence[Curve]) -> Side:
        """The side of these runs. Raises ConfigError when it has fewer than two budgets, or one of them no cost."""
        ends = [curve.points[-1] for curve in curves]
        if missing := [curve.name for curve in curves if not curve.has("flops") or not curve.has("tokens")]:
            raise ConfigError([Problem(missing[0], "has no FLOPs or tokens in its metrics", "Leave it out")])
        if len({end.cost["flops"] for end in ends}) < 2:
            message = f"has {many(len(ends), 'run')} of one budget, and a line needs two budgets"
            raise ConfigError([Problem(name, message, f"Name more runs as {name}=FOLDER")])
        return cls(name, tuple(sorted(ends, key=lambda end: end.cost["flops"])))

    @property
    def costs(self) -> list[str]:
        """What all its ends have."""
        return [cost for cost in COSTS if all(end.cost.get(cost, 0) > 0 for end in self.ends)]

    def line(self, cost: str) -> Line:
        """The line through its ends. Raises ConfigError when their losses do not fall with the cost."""
        xs, ys = [math.log(end.cost[cost]) for end in self.ends], [end.loss for end in self.ends]
        slope, level = statistics.linear_regression(xs, ys)
        if slope >= 0:
            message = f"the losses of its ends do not fall with {cost}: {', '.join(f'{y:.4f}' for y in ys)}"
            raise ConfigError([Problem(self.name, message, "Compare runs of other budgets")])
        deviation = math.sqrt(statistics.mean((level + slope * x - y) ** 2 for x, y in zip(xs, ys, strict=True)))
        return Line(level, -slope, deviation)


@dataclass(frozen=True)
class Distance:
    """How far an end of one side is from the baseline's line."""

    end: Point
    baseline: float
    """Cost at which the baseline's line has the loss of the end."""
    speedup: float
    extrapolated: bool
    """The loss is beyond the ends of the baseline."""


def distances(baseline: Side, other: Side, cost: str) -> list[Distance]:
    """The horizontal distance at each end of the other side."""
    line = baseline.line(cost)
    losses = [end.loss for end in baseline.ends]
    found = []
    for end in other.ends:
        needed = line.cost_at(end.loss)
        outside = not min(losses) <= end.loss <= max(losses)
        found.append(Distance(end, needed, needed / end.cost[cost] - 1.0, outside))
    return found


def frontier_report(sides: Sequence[Side]) -> list[str]:
    """The lines of all sides, and the distances of each from the first, as lines of text."""
    lines = []
    for side in sides:
        line = side.line("flops")
        ends = f"{many(len(side.ends), 'end')}, {side.ends[0].loss:.4f} to {side.ends[-1].loss:.4f}"
        fit = f"{line.slope * math.log(2):.4f} nats for each doubling of FLOPs, {line.deviation:.4f} off it"
        lines.append(f"{side.name}: {ends}; {fit}")
    for other in sides[1:]:
        lines.append(f"{other.name} against {sides[0].name}, at equal loss of annealed ends:")
        for cost in other.costs:
            if cost not in sides[0].costs:
                continue
            found = distances(sides[0], other, cost)
            shown = ", ".join(f"{one.speedup:+.1%}{' (extrapolated)' if one.extrapolated else ''}" for one in found)
            mean = statistics.mean(one.speedup for one in found)
            label = {"flops": "FLOPs"}.get(cost, cost)
            lines.append(f"  speedup in {label}: {shown}; mean {mean:+.1%}")
    return lines


def not_annealed(curve: Curve, path: Path) -> str | None:
    """A sentence about a run whose last learning rate is too high for an end, from its metrics; None for a good one."""
    file = path / METRICS_FILE if path.is_dir() else path
    rates = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rate = json.loads(line).get("lr")
        except (ValueError, AttributeError):
            continue
        if isinstance(rate, int | float):
            rates.append(float(rate))
    if not rates or rates[-1] <= ANNEALED * max(rates):
        return None
    share = rates[-1] / max(rates)
    return f"{curve.name} ({path}) ends at {share:.0%} of its peak learning rate: its end is not annealed"
