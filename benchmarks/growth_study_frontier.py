"""The headline of the growth study: how far the ends of grown runs are from the frontier of those from scratch.

A speedup is FLOPs from scratch over FLOPs grown, minus one, at the loss of a grown end (Du et al., NeurIPS 2024; base,
head and attention are counted). The frontier between two neighbouring ends of the baseline is a straight line over the
logarithm of the FLOPs. The line through all its ends, which `titan_growth plot --frontier` draws, stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titan_growth.metrics.curves import Point
from titan_growth.metrics.frontier import Side


@dataclass(frozen=True)
class Speedup:
    """Of one end against the frontier of runs from scratch, as ratios of costs: 1.5 is 50 % more for the baseline.

    Attributes:
        flops: the ratio of the FLOPs, between the baseline's neighbouring ends.
        by_line: the same, by the line through all of the baseline's ends.
        tokens: the ratio of the tokens. What is left of `flops` is the cheap phase.
        extrapolated: no end of the baseline has so low, or so high, a loss.
    """

    flops: float
    by_line: float
    tokens: float
    extrapolated: bool

    @property
    def cheaper(self) -> float:
        """The factor of cheaper tokens: FLOPs per token from scratch over those of the grown run, on average."""
        return self.flops / self.tokens


def side_of(name: str, entries: Sequence[dict[str, Any]]) -> Side | None:
    """Ends as a side of a frontier; None for fewer than two budgets."""
    if len({entry["end"] for entry in entries}) < 2:
        return None
    points = [Point(one["end"], one["loss"], {cost: one[cost] for cost in ("flops", "tokens")}) for one in entries]
    return Side(name, tuple(sorted(points, key=lambda point: point.cost["flops"])))


def speedup(baseline: Side, entry: dict[str, Any]) -> Speedup:
    """Of an end against the baseline at the same loss."""
    loss, losses = entry["loss"], [end.loss for end in baseline.ends]
    flops = cost_between(baseline, loss)
    per_token = baseline.ends[-1].cost["flops"] / baseline.ends[-1].cost["tokens"]
    return Speedup(
        flops / entry["flops"],
        baseline.line("flops").cost_at(loss) / entry["flops"],
        flops / per_token / entry["tokens"],
        extrapolated=not min(losses) <= loss <= max(losses),
    )


def cost_between(side: Side, loss: float) -> float:
    """FLOPs at which the side has a loss, on the line through the two ends around it, or through the nearest two."""
    pairs = list(itertools.pairwise(side.ends))
    first, second = next((pair for pair in pairs if pair[1].loss <= loss), pairs[-1])
    costs = [math.log(end.cost["flops"]) for end in (first, second)]
    share = (first.loss - loss) / (first.loss - second.loss)
    return math.exp(costs[0] + share * (costs[1] - costs[0]))
