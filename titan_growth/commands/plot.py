"""`python -m titan_growth plot`: validation loss against FLOPs, tokens and seconds, and the speedup at equal loss.

The first run is the baseline. All numbers come from the `metrics.jsonl` of the runs; with `--layers`, from the
`layers.jsonl` of one.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from titan_growth.commands.args import CommandLine
from titan_growth.commands.pictures import COLORS, LABELS, SUFFIXES, figure_of, picture_file, without_frame
from titan_growth.commands.plot_frontier import draw_frontier
from titan_growth.commands.plot_layers import draw_layers
from titan_growth.metrics.curves import COSTS, Curve, compare, read_curve, report, weights_of
from titan_growth.metrics.frontier import Side, frontier_report, not_annealed
from titan_growth.metrics.layer_curves import read_layer_curves
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.text import many

SCALES = {1: "", 10**3: "thousands", 10**6: "millions", 10**9: "billions", 10**12: "trillions"}


@dataclass(frozen=True)
class Run:
    """A run to draw: its folder, or a metrics.jsonl."""

    name: str
    path: Path


_LINE = CommandLine(
    "plot",
    """Compares runs by their validation loss. The first run is the baseline: for each other one it prints the
    speedup at the lowest loss that both reach, in FLOPs, tokens and seconds.""",
    example="scratch=outputs/scratch grown=outputs/grown --to curves.png",
    statuses="0 printed, 2 wrong arguments",
)
_LINE.words(
    "NAME=RUN",
    "A run's job.dump_folder, or a metrics.jsonl.",
    dest="runs",
    many=True,
    missing=Problem("", "no run is named", "Name at least one, as NAME=FOLDER"),
)
_LINE.option("--to", "FILE", f"Draw the curves into a {', '.join(SUFFIXES)}, with growths marked.", picture_file)
_LINE.switch(
    "--frontier",
    """Compare the ends of runs: those of one NAME are a side, each run an annealed budget. Prints the horizontal
    distances between the lines through them.""",
)
_LINE.option(
    "--layers",
    "METRIC",
    """Draw a metric of layers.jsonl into --to instead, by layer over the steps of the one run: METRIC or METRIC.GROUP,
    such as update_ratio or activation_rms.attention.""",
)
_LINE.option("--title", "TEXT", "Printed above the picture.")


@_LINE.command
def main(args: Namespace) -> int:
    """Compares the runs; returns the exit status."""
    runs = [_run(word) for word in args.runs]
    if args.layers is not None:
        return _layers(runs, args)
    if args.frontier:
        return _frontier(runs, args.to, args.title or "")
    if twice := [name for name, count in Counter(run.name for run in runs).items() if count > 1]:
        raise ConfigError(
            [Problem(name, "is given twice", "With --frontier, runs of one name are a side") for name in twice]
        )
    curves = [read_curve(run.name, run.path) for run in runs]
    lines = report([compare(curves[0], other) for other in curves[1:]])
    if len(curves) > 1 and all(curve.has("seconds") for curve in curves):
        lines.append("seconds are those of the clock: they compare runs that had the same machine to themselves")
    for curve in curves:
        if not curve.has("seconds"):
            lines.append(f"{curve.name} was written by a version that counted no seconds")
    for run in runs:
        if start := weights_of(run.path):
            lines.append(f"{run.name} started from the weights of {start}; what those cost is not in its curve")
    if args.to is not None:
        left_out = draw(curves, args.to, args.title or "")
        lines.append(f"drawn: {args.to}{f' ({left_out})' if left_out else ''}")
    print("\n".join(lines))
    return 0


def _frontier(runs: Sequence[Run], target: Path | None, title: str) -> int:
    """Compares sides of annealed ends."""
    curves: dict[str, list[Curve]] = {}
    notes = []
    for run in runs:
        curve = read_curve(run.name, run.path)
        curves.setdefault(run.name, []).append(curve)
        notes += [note] if (note := not_annealed(curve, run.path)) else []
    sides = [Side.of(name, ones) for name, ones in curves.items()]
    lines = [*frontier_report(sides), *notes]
    if target is not None:
        draw_frontier(sides, target, title)
        lines.append(f"drawn: {target}")
    print("\n".join(lines))
    return 0


def _layers(runs: Sequence[Run], args: Namespace) -> int:
    """Draws what the layers of a run do."""
    if len(runs) != 1 or args.frontier:
        raise ConfigError([Problem("--layers", "draws one run", "Name one, without --frontier")])
    if args.to is None:
        raise ConfigError([Problem("--layers", "draws a picture", "Name its file with --to")])
    draw_layers(read_layer_curves(runs[0].path, args.layers), args.to, args.title or "")
    print(f"drawn: {args.to}")
    return 0


def _run(word: str) -> Run:
    name, equals, path = word.partition("=")
    if equals and not Path(word).exists():  # a folder may well be called lr=3e-4
        return Run(name, Path(path))
    return Run(Path(word).resolve().name, Path(word))


def draw(curves: Sequence[Curve], target: Path, title: str = "") -> str:
    """Draws a panel for each cost that all runs have.

    Returns:
        What is not shown, which the picture says too; empty when that is nothing.

    Raises:
        ConfigError: when the picture cannot be written.
    """
    costs = [cost for cost in COSTS if all(curve.has(cost) for curve in curves)]
    low, high = _range(curves)
    above = sum(point.loss > high for curve in curves for point in curve.points)
    left_out = f"{many(above, 'early validation')} above {high:.2f} not shown" if above else ""
    with figure_of(costs, target, title) as (figure, panels):
        for cost, panel in panels.items():
            row = 0
            for curve, color in zip(curves, cycle(COLORS), strict=False):
                row += _panel(panel, curve, cost, color, row)
            _x_axis(panel, cost, max(point.cost[cost] for curve in curves for point in curve.points))
            panel.grid(alpha=0.25)
            without_frame(panel)
        panels[costs[0]].set_ylabel("validation loss")
        panels[costs[0]].set_ylim(low, high)
        panels[costs[-1]].legend(frameon=False)
        if left_out:
            figure.supxlabel(left_out, fontsize=8, x=0.99, ha="right")
    return left_out


def _x_axis(panel: Any, cost: str, largest: float) -> None:
    """Numbers of at most three digits, in a unit that the label names: all panels are written in one way."""
    scale = max(size for size in SCALES if size <= max(largest, 1.0))
    if cost == "flops":
        scale = 10 ** max(0, math.floor(math.log10(max(largest, 1.0))))
    unit = f"1e{round(math.log10(scale))}" if cost == "flops" else SCALES[scale]
    panel.set_xlabel(f"{LABELS[cost]}, {unit}" if unit and scale > 1 else LABELS[cost])
    panel.xaxis.set_major_formatter(lambda value, _: f"{value / scale:.4g}")
    panel.set_xlim(left=0)


def _panel(panel: Any, curve: Curve, cost: str, color: str, row: int) -> int:
    """One run in one panel: its curve, and a ring where it grew, with a label above the panel in a row of its own.

    Returns:
        How many rows of labels it has taken: 1 for a run that grew.
    """
    xs, ys = [point.cost[cost] for point in curve.points], [point.loss for point in curve.points]
    panel.plot(xs, ys, color=color, label=curve.name, linewidth=1.6, marker=".", markersize=4)
    at_step = {point.step: point for point in curve.points}
    drawn = 0
    for growth in curve.growths:
        point = at_step.get(growth.step)
        # The validation before the growth: the growth itself takes seconds, and a ring there would be off the curve.
        x = growth.cost.get(cost) if point is None else point.cost[cost]
        if x is None:
            continue
        drawn = 1
        panel.axvline(x, color=color, linewidth=0.8, linestyle=":")
        if point is not None:
            panel.plot([x], [point.loss], "o", color=color, markerfacecolor="white", markersize=7)
        panel.annotate(
            f"{growth.from_layers} → {growth.to_layers} layers"
            if growth.from_layers != growth.to_layers
            else "same depth",
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2 + 10 * row),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=color,
        )
    return drawn


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    """The losses to show: without the first fall, which would flatten the rest."""
    low = min(curve.best_loss for curve in curves)
    high = max(point.loss for curve in curves for point in curve.points[max(1, len(curve.points) // 10) :])
    margin = 0.04 * max(high - low, 1e-3)
    return low - margin, high + margin
