"""What the pictures of `titan_growth plot` share: colours, labels, a figure with a panel for each cost, saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_growth.tools.errors import ConfigError, Problem

SUFFIXES = (".png", ".svg", ".pdf")
LABELS = {"flops": "training FLOPs", "tokens": "training tokens", "seconds": "wall-clock seconds"}
# Okabe and Ito's colours, distinct to the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@contextlib.contextmanager
def figure_of(costs: Sequence[str], target: Path, title: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A figure and its panels by cost, to draw into; written at the end.

    Raises:
        ConfigError: when the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(costs), figsize=(4.4 * len(costs), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    try:
        yield figure, dict(zip(costs, panels[0], strict=True))
        if title:
            figure.suptitle(title, fontsize=11)
        figure.savefig(target, dpi=130)
    except OSError as error:
        raise ConfigError([Problem("--to", f"{target}: {error.strerror or error}")]) from None
    finally:
        pyplot.close(figure)


def without_frame(panel: Any) -> None:
    """Takes away the edges that carry no axis."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
