"""The picture of `titan_growth plot --frontier`: ends of runs, and the lines through them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from titan_growth.commands.pictures import COLORS, LABELS, figure_of, without_frame
from titan_growth.metrics.frontier import Side


def draw_frontier(sides: Sequence[Side], target: Path, title: str = "") -> None:
    """A panel for each cost that all ends have: loss over the cost, on a logarithmic axis.

    Raises:
        ConfigError: when the picture cannot be written.
    """
    costs = [cost for cost in LABELS if all(cost in side.costs for side in sides)]
    with figure_of(costs, target, title) as (_, panels):
        for cost, panel in panels.items():
            for side, color in zip(sides, cycle(COLORS), strict=False):
                xs = [end.cost[cost] for end in side.ends]
                panel.plot(xs, [end.loss for end in side.ends], "o", color=color, label=side.name, markersize=5)
                line, span = side.line(cost), (min(xs), max(xs))
                panel.plot(span, [line.loss_at(x) for x in span], color=color, linewidth=1.2)
            panel.set_xscale("log")
            panel.tick_params(axis="x", which="minor", labelsize=6)
            panel.set_xlabel(LABELS[cost])
            panel.grid(alpha=0.25, which="both")
            without_frame(panel)
        panels[costs[0]].set_ylabel("validation loss of annealed ends")
        panels[costs[-1]].legend(frameon=False)
