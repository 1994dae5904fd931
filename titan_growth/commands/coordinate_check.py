"""`python -m titan_growth coordinate_check`: do activations depend on width and depth?"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan_growth.commands.args import CommandLine, given, positive
from titan_growth.commands.coordinates import GROUPS, Scan, Trial, measured, sized
from titan_growth.commands.pictures import SUFFIXES, panels_of, picture_file, save_figure
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.optimizers.base import check_optimizer
from titan_growth.run.check_treatments import check_treatments
from titan_growth.tools.device import Device
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.files import write_atomic
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many


def _sizes(text: str) -> list[int]:
    sizes = [positive(word) for word in given(text).split(",")]
    if len(set(sizes)) < 2 or sizes != sorted(sizes):
        raise ValueError(f"expected at least two sizes, smallest first, such as 64,128,256, got '{text}'")
    return sizes


_LINE = CommandLine(
    "coordinate_check",
    """Trains models of several widths and depths for a few steps, in this process and on random tokens, and prints how
    activations and their changes go with the size. Under model.parametrization = "mup" they do not depend on the
    width, under "completep" on neither. Model, optimizer and seed are the recipe's; the learning rate is optimizer.lr
    from the first step on.""",
    example="--model.parametrization completep --model.mup.base_dim 64 --model.mup.base_n_layers 2 --to check.png",
    statuses="0 printed, 2 wrong arguments or recipe",
    recipe=True,
)
_LINE.option("--widths", "64,128,...", "Values of model.dim, at the smallest depth.", _sizes)
_LINE.option("--depths", "2,4,...", "Values of model.n_layers, at the smallest width.", _sizes)
_LINE.option("--steps", "N", "Steps of the optimizer.", positive, default=4)
_LINE.option("--batch-size", "N", "Sequences.", positive, default=4)
_LINE.option("--seq-len", "N", "Tokens of a sequence.", positive, default=64)
_LINE.option("--to", "FILE", f"Draw every step into a {', '.join(SUFFIXES)}.", picture_file)
_LINE.option("--json", "FILE", "Write every number into a file.")

WIDTHS, DEPTHS = [64, 128, 256, 512], [2, 4, 8, 16, 32]
"""What is compared when nothing is said."""


@_LINE.command
def main(args: Namespace) -> int:
    """Measures and prints; returns the exit status."""
    recipe = inspect_recipe(args.recipe, found := Findings())
    found.raise_if_any()
    assert recipe is not None
    config = _config(recipe)
    trial = Trial(
        family=recipe.model.name,
        optimizer=recipe.optimizer,
        max_norm=recipe.training.max_norm,
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        seed=recipe.debug.seed or 0,
        device=Device.detect().torch,
    )
    scans = list(scans_of(config, trial, args.widths or WIDTHS, args.depths or DEPTHS))
    title = f"{recipe.model.parametrization}, {recipe.optimizer.name}, lr {recipe.optimizer.lr:g}"
    print("\n".join([title, *(line for scan in scans for line in scan.lines())]))
    if args.json is not None:
        table = {"model": asdict(config), "lr": recipe.optimizer.lr, "scans": [asdict(scan) for scan in scans]}
        write_atomic(Path(args.json), json.dumps(table, indent=1) + "\n")
    if args.to is not None:
        draw(scans, args.to, title)
    return 0


def _config(recipe: Recipe) -> DecoderConfig:
    """The recipe's model. Raises ConfigError when there is none, or its optimizer does not go with it."""
    config = model_config_of(recipe.model, found := Findings())
    check_optimizer(recipe.optimizer, found)
    if config is not None and not found.problems:
        check_treatments(recipe.optimizer, recipe.model.name, config, found)
    found.raise_if_any()
    assert config is not None
    return config


def scans_of(config: DecoderConfig, trial: Trial, widths: list[int], depths: list[int]) -> Iterator[Scan]:
    """The two scans: widths at the smallest depth, depths at the smallest width.

    Raises:
        ConfigError: when the model cannot be as wide.
    """
    models = {(width, depth): sized(config, width, depth) for width, depth in _pairs(widths, depths)}
    if wrong := [Problem("--widths", why) for why in dict.fromkeys(models.values()) if isinstance(why, str)]:
        raise ConfigError(wrong)
    found = {at: measured(model, trial) for at, model in models.items() if not isinstance(model, str)}
    yield Scan("width", many(depths[0], "layer"), widths, [found[width, depths[0]] for width in widths])
    yield Scan("depth", f"dim {widths[0]}", depths, [found[widths[0], depth] for depth in depths])


def _pairs(widths: Sequence[int], depths: Sequence[int]) -> dict[tuple[int, int], None]:
    """(width, depth) of every model, each once."""
    return dict.fromkeys([*((width, depths[0]) for width in widths), *((widths[0], depth) for depth in depths)])


def draw(scans: Sequence[Scan], target: Path, title: str) -> None:
    """Draws sizes and changes against width and depth, a line for each step.

    Raises:
        ConfigError: when the picture cannot be written.
    """
    rows = [(scan, kind) for scan in scans for kind in ("rms", "change")]
    panels = panels_of(len(rows), len(GROUPS), figsize=(2.6 * len(GROUPS), 2.2 * len(rows)))
    for (scan, kind), row in zip(rows, panels, strict=True):
        for group, panel in zip(GROUPS, row, strict=True):
            _panel(panel, scan, kind, group)
        row[0].set_ylabel("root mean square" if kind == "rms" else "change since step 0")
    panels[0][-1].legend(fontsize=6, title="step", title_fontsize=6)
    figure = panels[0][0].figure
    figure.suptitle(title, fontsize=10)
    save_figure(figure, target)


def _panel(panel: Any, scan: Scan, kind: str, group: str) -> None:
    steps = range(1 if kind == "change" else 0, len(scan.coordinates[0]))
    for step in steps:
        color = (0.0, 0.45 * step / max(steps), 0.3 + 0.6 * step / max(steps))
        panel.plot(scan.sizes, scan.values(kind, group, step), marker=".", color=color, label=str(step))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high < 10 * low:  # what is flat looks flat
        middle = (low * high) ** 0.5
        panel.set_ylim(middle / 10**0.5, middle * 10**0.5)
    panel.yaxis.set_minor_formatter(lambda *_: "")
    low, high = panel.get_ylim()
    if high < 10 * low:  # what is flat looks flat
        middle = (low * high) ** 0.5
        panel.set_ylim(middle / 10**0.5, middle * 10**0.5)
    panel.yaxis.set_minor_formatter(lambda *_: "")
    panel.set_title(f"{group}: {scan.exponent(kind, group, steps[-1]):+.2f}", fontsize=8)
    panel.set_xlabel(scan.axis, fontsize=8)
    panel.tick_params(labelsize=6)
    panel.grid(alpha=0.25)
