"""Validation curves of whole runs, and the cost of reaching a loss.

Two runs are compared at equal loss: the lowest that both reach. Speedup is that of Du et al. (NeurIPS 2024, section 3):
cost of the baseline over cost of the other, minus one. Cost is FLOPs, tokens or seconds since the run began, small
models before a growth included. Curves are interpolated linearly between validations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from titan_growth.metrics.lines import read_lines
from titan_growth.metrics.records import shadow_losses_of
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.run_folder import METRICS_FILE, RECIPE_FILE
from titan_growth.tools.text import many, one_line

COSTS = ("flops", "tokens", "seconds")


@dataclass(frozen=True)
class Point:
    """A validation."""

    step: int
    loss: float
    cost: dict[str, float]
    """Since the run began, keyed by `COSTS`; runs of older versions have no seconds."""
    shadows: dict[str, float] = field(default_factory=dict)
    """Kind of shadow weights -> the loss with them."""


@dataclass(frozen=True)
class Growth:
    """A growth during the run."""

    step: int
    from_layers: int
    to_layers: int
    cost: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """The validations and growths of a run, in order."""

    name: str
    points: tuple[Point, ...]
    growths: tuple[Growth, ...]

    @property
    def best_loss(self) -> float:
        """The lowest validation loss."""
        return min(point.loss for point in self.points)

    @property
    def shadows(self) -> list[str]:
        """The kinds of shadow weights that were validated, in the order of their first."""
        return list(dict.fromkeys(kind for point in self.points for kind in point.shadows))

    def has(self, cost: str) -> bool:
        """Whether every validation has this cost."""
        return all(cost in point.cost for point in self.points)

    def cost_of(self, loss: float, cost: str) -> float | None:
        """The cost at which the run first reached a loss; None if it never did."""
        before: Point | None = None
        for point in self.points:
            if point.loss <= loss:
                if before is None or before.loss <= point.loss:
                    return point.cost[cost]
                share = (before.loss - loss) / (before.loss - point.loss)
                return before.cost[cost] + share * (point.cost[cost] - before.cost[cost])
            before = point
        return None


class Factors(NamedTuple):
    """Why one run needs fewer FLOPs than another: it learns more from a token, or its tokens are cheaper.

    With r FLOPs per token of the small model over those of the large one, and tau of T tokens before the growth, the
    second factor is 1 / (1 - (1 - r) tau / T): it is certain, and the first one is what growth has done to learning.
    """

    tokens: float
    """Tokens of the baseline over those of the other run."""
    cheaper: float
    """FLOPs per token of the baseline over those of the other run, on average until then."""


@dataclass(frozen=True)
class Comparison:
    """Two runs at equal loss."""

    baseline: Curve
    other: Curve
    loss: float
    """The lowest that both reach."""
    costs: dict[str, tuple[float, float]]
    """Cost -> (of the baseline, of the other)."""

    def speedup(self, cost: str) -> float:
        """As a fraction: 0.5 means the baseline costs 1.5 times as much."""
        baseline, other = self.costs[cost]
        return baseline / other - 1.0

    def factors(self) -> Factors | None:
        """What the ratio of the FLOPs is the product of; None for a run without tokens or FLOPs."""
        if not {"flops", "tokens"} <= self.costs.keys() or min(self.costs["tokens"]) <= 0:
            return None
        (flops, other_flops), (tokens, other_tokens) = self.costs["flops"], self.costs["tokens"]
        return Factors(tokens / other_tokens, (flops / tokens) / (other_flops / other_tokens))


def compare(baseline: Curve, other: Curve) -> Comparison:
    """The costs of two runs at the lowest loss that both reach."""
    loss = max(baseline.best_loss, other.best_loss)
    costs = {}
    for cost in COSTS:
        if baseline.has(cost) and other.has(cost):
            pair = (baseline.cost_of(loss, cost), other.cost_of(loss, cost))
            assert pair[0] is not None, "the baseline reaches a loss that it has reached"
            assert pair[1] is not None, "the other run reaches a loss that it has reached"
            costs[cost] = (pair[0], pair[1])
    return Comparison(baseline, other, loss, costs)


def read_curve(name: str, path: Path) -> Curve:
    """The curve of a run.

    Args:
        path: the run's folder (`job.dump_folder`), or a metrics.jsonl.

    Raises:
        ConfigError: when it cannot be read, or has not validated at least twice.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    found = read_lines(file, _point_or_growth)
    points = [one for one in found if isinstance(one, Point)]
    if len(points) < 2:
        message = f"{file} has {many(len(points), 'validation')}, and a curve needs two"
        raise ConfigError([Problem(name, message, "Set validation.enable = true and a smaller validation.freq")])
    return Curve(name, tuple(points), tuple(one for one in found if isinstance(one, Growth)))


def _point_or_growth(entry: dict[str, Any]) -> Point | Growth | None:
    if entry.get("event") == "growth":
        step, before, after = (int(entry[key]) for key in ("step", "from_layers", "to_layers"))
        return Growth(step, before, after, _costs(entry))
    if entry.get("validation_loss") is not None:
        return Point(int(entry["step"]), _finite(entry["validation_loss"]), _costs(entry), _shadows(entry))
    return None


def _costs(entry: dict[str, Any]) -> dict[str, float]:
    return {cost: _finite(entry[cost]) for cost in COSTS if entry.get(cost) is not None}


def _shadows(entry: dict[str, Any]) -> dict[str, float]:
    return {kind: _finite(value) for kind, value in shadow_losses_of(entry).items() if value is not None}


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("is not finite")
    return number


def report(comparisons: Sequence[Comparison]) -> list[str]:
    """The comparisons as lines of text."""
    lines = []
    for one in comparisons:
        lines.append(f"{one.other.name} against {one.baseline.name}, at validation loss {one.loss:.4f}:")
        for cost, (baseline, other) in one.costs.items():
            show = {"flops": "{:.3e}", "tokens": "{:,.0f}", "seconds": "{:,.1f}"}[cost].format
            label = {"flops": "FLOPs"}.get(cost, cost)
            lines.append(f"  {label:8} {show(baseline):>14} -> {show(other):>14}   speedup {one.speedup(cost):+7.1%}")
        if factors := one.factors():
            total = one.costs["flops"][0] / one.costs["flops"][1]
            lines.append(
                f"  x{total:.2f} in FLOPs = x{factors.tokens:.2f} in tokens, x{factors.cheaper:.2f} by cheaper tokens"
            )
        ends = [_end(curve) for curve in (one.baseline, one.other)]
        lines.append(f"  last validation loss: {', '.join(ends)}")
    return lines


def _end(curve: Curve) -> str:
    """`grown 2.3518 (ema 2.3301)`: its last validation."""
    last = curve.points[-1]
    shadows = ", ".join(f"{kind} {loss:.4f}" for kind, loss in last.shadows.items())
    return f"{curve.name} {last.loss:.4f}{f' ({shadows})' if shadows else ''}"


def weights_of(path: Path) -> str | None:
    """Where a run's initial weights came from, if its counters still began at zero; None otherwise."""
    try:
        table = tomli.loads((path / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    section = table.get("checkpoint")
    if not isinstance(section, dict):
        return None
    start = section.get("initial_load_path")
    return one_line(str(start)) if start and section.get("initial_load_model_only", True) else None
