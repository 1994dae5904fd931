"""`python -m titan_growth plot`: validation loss against FLOPs, tokens and seconds, and the speedup at equal loss.

    python -m titan_growth plot scratch=outputs/scratch grown=outputs/grown --to curves.png

The first run is what the others are compared with. Everything comes from the `metrics.jsonl` of the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_growth.metrics.curves import COSTS, Curve, compare, read_curve, report, weights_of
from titan_growth.tools.errors import ConfigError, Problem, print_error
from titan_growth.tools.packages import missing_package

USAGE = """usage: python -m titan_growth plot NAME=RUN [NAME=RUN ...] [--to FILE] [--title TEXT]

RUN is a run's job.dump_folder, or a metrics.jsonl. The first run is the baseline: for each other one it prints the
speedup at the lowest validation loss that both reach, in FLOPs, tokens and seconds.

  --to FILE      draw the curves into a .png, .svg or .pdf, growths marked
  --title TEXT   above the picture

Exit status: 0, or 2 for wrong arguments.
"""

SUFFIXES = (".png", ".svg", ".pdf")
LABELS = {"flops": "training FLOPs", "tokens": "training tokens", "seconds": "seconds"}
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return 0
    try:
        runs, target, title = _arguments(argv)
        curves = [read_curve(name, path) for name, path in runs]
        lines = report([compare(curves[0], other) for other in curves[1:]])
        for curve in curves:
            if not curve.has("seconds"):
                lines.append(f"{curve.name} was written by a version that counted no seconds")
        for name, path in runs:
            if start := weights_of(path):
                lines.append(f"{name} started from the weights of {start}; what those cost is not in its curve")
        if target is not None:
            draw(curves, target, title)
            lines.append(f"drawn: {target}")
    except ConfigError as error:
        return print_error(error)
    print("\n".join(lines))
    return 0


def _arguments(argv: list[str]) -> tuple[list[tuple[str, Path]], Path | None, str]:
    runs: list[tuple[str, Path]] = []
    options: dict[str, str] = {}
    problems = []
    words = iter(argv)
    for word in words:
        if word.startswith("--"):
            name, has_value, text = word.partition("=")
            value = text if has_value else next(words, None)
            if name not in ("--to", "--title"):
                problems.append(Problem(word, "is no argument of this command", "It takes NAME=RUN, --to and --title"))
            elif value is None:
                problems.append(Problem(word, "needs a value"))
            else:
                options[name] = value
            continue
        name, has_name, path = word.partition("=")
        named = has_name and not Path(word).exists()  # a folder may well be called lr=3e-4
        runs.append((name, Path(path)) if named else (Path(word).resolve().name, Path(word)))
    if not runs:
        problems.append(Problem("", "no run is named", "Name at least one, as NAME=FOLDER"))
    problems += [Problem(name, "is given twice") for name in {name for name, _ in runs} if _times(name, runs) > 1]
    target = Path(options["--to"]) if "--to" in options else None
    if target is not None and target.suffix.lower() not in SUFFIXES:
        problems.append(Problem("--to", f"{target} must end in {', '.join(SUFFIXES)}"))
    elif target is not None and not target.parent.is_dir():
        problems.append(Problem("--to", f"there is no folder {target.parent}"))
    elif target is not None and (problem := missing_package("--to", "matplotlib", "leave it out")):
        problems.append(problem)
    if problems:
        raise ConfigError(problems)
    return runs, target, options.get("--title", "")


def _times(name: str, runs: Sequence[tuple[str, Path]]) -> int:
    return sum(one == name for one, _ in runs)


def draw(curves: Sequence[Curve], target: Path, title: str = "") -> None:
    """Draws one panel for each cost that all runs know.

    Raises:
        ConfigError: when the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs = [cost for cost in COSTS if all(curve.has(cost) for curve in curves)]
    figure, panels = pyplot.subplots(
        1, len(costs), figsize=(4.4 * len(costs), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for cost, panel in zip(costs, panels[0], strict=True):
        for curve, color in zip(curves, _colors(len(curves)), strict=True):
            _panel(panel, curve, cost, color)
        panel.set_xlabel(LABELS[cost])
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0][0].set_ylabel("validation loss")
    panels[0][0].set_ylim(*_range(curves))
    panels[0][0].legend(frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    try:
        figure.savefig(target, dpi=130)
    except OSError as error:
        raise ConfigError([Problem("--to", f"{target}: {error.strerror or error}")]) from None
    finally:
        pyplot.close(figure)


def _panel(panel: Any, curve: Curve, cost: str, color: str) -> None:
    """One run in one panel: its curve, and a ring where it grew."""
    xs, ys = [point.cost[cost] for point in curve.points], [point.loss for point in curve.points]
    panel.plot(xs, ys, color=color, label=curve.name, linewidth=1.6, marker=".", markersize=4)
    at_step = {point.step: point for point in curve.points}
    for growth in curve.growths:
        x = growth.cost.get(cost)
        if x is None:
            continue
        panel.axvline(x, color=color, linewidth=0.8, linestyle=":")
        if growth.step in at_step:
            panel.plot([x], [at_step[growth.step].loss], "o", color=color, markerfacecolor="white", markersize=7)
        panel.annotate(
            f"{growth.from_layers} → {growth.to_layers} layers" if growth.from_layers != growth.to_layers else "wider",
            (x, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8,
            color=color,
        )


def _colors(num_curves: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(num_curves)]


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Losses to show: all but the first fall, beside which the rest would be flat."""
    low = min(curve.best_loss for curve in curves)
    late = [point.loss for curve in curves for point in curve.points[max(1, len(curve.points) // 10) :]]
    high = max(late)
    margin = 0.04 * max(high - low, 1e-3)
    return low - margin, high + margin
