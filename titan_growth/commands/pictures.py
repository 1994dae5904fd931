"""What the pictures of `titan_growth plot` share: colours, labels, a figure with a panel for each cost, saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_growth.commands.args import given
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.packages import missing_package

SUFFIXES = (".png", ".svg", ".pdf")
LABELS = {"flops": "training FLOPs", "tokens": "training tokens", "seconds": "wall-clock seconds"}
# Okabe and Ito's colours, distinct to the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def picture_file(text: str) -> Path:
    """The file of a picture, which can be drawn. Raises ValueError with the reason otherwise."""
    path = Path(given(text))
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    if problem := missing_package("--to", "matplotlib", "leave it out"):
        raise ValueError(f"{problem.message}. {problem.hint}")
    return path


def panels_of(num_rows: int, num_columns: int, **settings: Any) -> Any:
    """The panels, in rows, of a new figure that needs no screen; matplotlib is loaded here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=settings.pop("figsize"), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots(num_rows, num_columns, squeeze=False, **settings)


def save_figure(figure: Any, target: Path) -> None:
    """Raises ConfigError when the picture cannot be written."""
    try:
        figure.savefig(target, dpi=130)
    except OSError as error:
        raise ConfigError([Problem("--to", f"{target}: {error.strerror or error}")]) from None


@contextlib.contextmanager
def figure_of(costs: Sequence[str], target: Path, title: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A figure and its panels by cost, to draw into; written at the end.

    Raises:
        ConfigError: when the picture cannot be written.
    """
    (panels,) = panels_of(1, len(costs), figsize=(4.4 * len(costs), 3.8), sharey=True)
    figure = panels[0].figure
    yield figure, dict(zip(costs, panels, strict=True))
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, target)


def without_frame(panel: Any) -> None:
    """Takes away the edges that carry no axis."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
