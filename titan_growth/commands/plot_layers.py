"""The picture of `titan_growth plot --layers`: a metric of every layer over the steps of a run."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from titan_growth.commands.pictures import COLORS, panels_of, save_figure, without_frame
from titan_growth.metrics.layer_curves import LayerCurves
from titan_growth.tools.errors import ConfigError, Problem


def draw_layers(curves: LayerCurves, target: Path, title: str = "") -> None:
    """A panel for each group: layers upwards, steps to the right, values as colours; or a curve without layers.

    Growths are dotted lines. The colours of all panels have one logarithmic scale, or a linear one if a value is not
    positive.

    Raises:
        ConfigError: when there is nothing to draw, or the picture cannot be written.
    """
    from matplotlib.colors import LogNorm, Normalize

    values = [one for rows in curves.groups.values() for row in rows for one in row if one is not None]
    if not values:
        raise ConfigError([Problem("--layers", f"no value of {curves.metric} is finite", "Choose another metric")])
    low, high = min(values), max(values)
    scale = LogNorm(low, max(high, low * (1 + 1e-6))) if low > 0 else Normalize(low, high)
    inside = [group for group in curves.groups if group not in curves.around]
    around = [group for group in curves.groups if group in curves.around]
    num_panels = len(inside) + bool(around)
    (panels,) = panels_of(1, num_panels, figsize=(4.4 * num_panels + 0.8, 3.8))
    for group, panel in zip(inside, panels, strict=False):
        image = _layers(panel, curves, group, scale)
        panel.set_ylabel("layer")
        panel.set_title(f"{curves.metric}, {group}", fontsize=9)
        if group == inside[-1]:
            panel.figure.colorbar(image, ax=panel)
    if around:
        _around(panels[-1], curves, around, is_log=low > 0)
        panels[-1].set_title(curves.metric, fontsize=9)
    edges = _edges(curves.steps)
    for panel in panels:
        panel.set_xlabel("step")
        panel.set_xlim(edges[0], edges[-1])
        for step in curves.growths:
            panel.axvline(step + 0.5, color="black", linewidth=0.9, linestyle=":")
        without_frame(panel)
    if title:
        panels[0].figure.suptitle(title, fontsize=11)
    save_figure(panels[0].figure, target)


def _layers(panel: Any, curves: LayerCurves, group: str, scale: Any) -> Any:
    rows = curves.groups[group]
    most = max(len(row) for row in rows)
    by_layer = [[_shown(row, layer) for row in rows] for layer in range(most)]
    edges = [layer - 0.5 for layer in range(most + 1)]
    return panel.pcolormesh(_edges(curves.steps), edges, by_layer, norm=scale, cmap="viridis", rasterized=True)


def _shown(row: list[float | None], layer: int) -> float:
    value = row[layer] if layer < len(row) else None
    return math.nan if value is None else value


def _edges(steps: tuple[int, ...]) -> list[float]:
    """The borders of the columns: halfway between two steps."""
    inner = [(one + other) / 2 for one, other in pairwise(steps)]
    return [steps[0] - 0.5, *inner, steps[-1] + 0.5]


def _around(panel: Any, curves: LayerCurves, groups: list[str], *, is_log: bool) -> None:
    for group, color in zip(groups, COLORS, strict=False):
        ys = [_shown(row, 0) for row in curves.groups[group]]
        panel.plot(curves.steps, ys, color=color, label=group, linewidth=1.6, marker=".", markersize=4)
    if is_log:
        panel.set_yscale("log")
    panel.legend(frameon=False)
