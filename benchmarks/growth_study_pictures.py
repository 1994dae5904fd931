"""The pictures of the growth study, from its JSON alone: ends against FLOPs, and what the moment of growth does."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.growth_study_frontier import cost_between, side_of
from benchmarks.growth_study_runs import GROWN, SCRATCH
from titan_growth.commands.pictures import COLORS, panels_of, save_figure, without_frame

Arms = dict[tuple[str, int], list[dict[str, Any]]]
"""(arm, last step) -> its ends, one for each seed."""
_COLOR = {SCRATCH: COLORS[6], GROWN: COLORS[0]}
_PAPER = "Du et al., 7B: 54.6 %"


def draw_headline(arms: Arms, target: Path) -> None:
    """Loss over FLOPs of both sides, two ends of each at least, with the speedup at the largest grown end."""
    sides = {name: _means(arms, name) for name in (SCRATCH, GROWN)}
    frontier = side_of(SCRATCH, sides[SCRATCH])
    assert frontier is not None, "a frontier has two ends at least"
    ((panel,),) = panels_of(1, 1, figsize=(6.6, 4.2))
    for name, means in sides.items():
        color = _COLOR[name]
        panel.plot([end["flops"] for end in means], [end["loss"] for end in means], color=color, linewidth=1.4)
        ends = [end for (arm, _), seeds in arms.items() if arm == name for end in seeds]
        xs, ys = [end["flops"] for end in ends], [end["loss"] for end in ends]
        panel.plot(xs, ys, "o", color=color, markersize=4, alpha=0.75, label=name)
    best = sides[GROWN][-1]
    flops, loss, needed = best["flops"], best["loss"], cost_between(frontier, best["loss"])
    panel.annotate("", (flops, loss), (needed, loss), arrowprops={"arrowstyle": "->", "lw": 1.2})
    text = f"{needed / flops - 1:+.0%} at equal loss\n({_PAPER})"
    below = {"xytext": (0, -6), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
    panel.annotate(text, ((flops * needed) ** 0.5, loss), **below)
    panel.set_xscale("log")
    panel.margins(y=0.16)
    panel.set_xlabel("training FLOPs of the whole run")
    panel.set_ylabel("validation loss of annealed ends")
    panel.grid(alpha=0.25, which="both")
    panel.tick_params(axis="x", which="minor", labelsize=6)
    panel.legend(frameon=False)
    without_frame(panel)
    save_figure(panel.figure, target)


def draw_timing(curves: dict[str, dict[float, list[float]]], target: Path) -> None:
    """Loss over the share of the steps before the growth, a curve for each operator.

    Args:
        curves: operator -> share -> losses of the seeds.
    """
    ((panel,),) = panels_of(1, 1, figsize=(5.6, 3.8))
    for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
        shares = sorted(curve)
        panel.plot(shares, [statistics.mean(curve[share]) for share in shares], color=color, linewidth=1.4, label=name)
        for share in shares:
            panel.plot([share] * len(curve[share]), curve[share], "o", color=color, markersize=4, alpha=0.75)
    panel.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    panel.set_xlabel("steps before the growth")
    panel.set_ylabel("validation loss of the annealed end")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False)
    without_frame(panel)
    save_figure(panel.figure, target)


def _means(arms: Arms, name: str) -> list[dict[str, Any]]:
    """The mean of the seeds for each last step of an arm, in the order of their FLOPs."""
    means = []
    for (arm, end), seeds in arms.items():
        if arm == name:
            costs = {key: statistics.mean(one[key] for one in seeds) for key in ("loss", "flops", "tokens")}
            means.append({"end": end, **costs})
    return sorted(means, key=lambda mean: mean["flops"])
