"""Where the best learning rate lies at three widths and three depths, by parametrisation.

    python -m benchmarks.lr_transfer [--steps 300] [--widths 64,128,256] [--depths 2,4,8] [--rates 1e-3,2e-3,...]

Each run is `benchmarks/growth_pays.toml` without growth: steps of 2,048 tokens under a cosine that ends with them, in
float32. Widths are compared at the smallest depth, depths at the smallest width; muP and CompleteP scale from there. A
best rate at the edge of the grid says nothing about the best one: there the grid is extended, by factors of 2 and twice
at most, and the best rate of the smallest model is trained at every size. Finished runs are not trained again. Writes
`benchmarks/results/lr_transfer.json`, `.md` and `.png` (elsewhere with --result); losses do not mind what else the
machine does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT, validation_losses, write
from titan_growth.commands.pictures import panels_of, save_figure

RECIPE = ROOT / "benchmarks" / "growth_pays.toml"
RESULT = ROOT / "benchmarks" / "results" / "lr_transfer.json"
COMMON = [
    "--growth.enable", "false",
    "--training.local_batch_size", "8",
    "--training.global_batch_size", "8",
    "--validation.steps", "16",
    "--checkpoint.enable", "false",
    "--training.mixed_precision_param", "float32",
    "--metrics.log_freq", "100",
]  # fmt: skip
NAMES = ("standard", "mup", "completep")
HEAD_DIM = 32
MOST_EXTENSIONS = 2
HIDDEN = 3
"""SwiGLU width over dim: no rounding, so all sizes have the same proportions."""


def main(argv: list[str] | None = None) -> int:
    """Trains what has not been trained; writes page and picture after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--widths", type=_ints, default=[64, 128, 256])
    parser.add_argument("--depths", type=_ints, default=[2, 4, 8])
    parser.add_argument("--rates", type=_floats, default=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3])
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "lr_transfer")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks.lr_transfer", *(sys.argv[1:] if argv is None else argv)])
    runs: list[dict[str, Any]] = []
    for at in _sizes(options):
        for lr in options.rates:
            runs += _trained(at, lr, options)
    for at in _sizes(options):
        for _ in range(MOST_EXTENSIONS):
            row = curves({"runs": runs})[at]
            if (lr := beyond(row)) is not None:
                runs += _trained(at, lr, options)
    for at in _sizes(options):
        found = curves({"runs": runs})
        base = found[at[0], options.widths[0], options.depths[0]]
        if (lr := min(base, key=lambda lr: base[lr])) not in found[at]:
            runs += _trained(at, lr, options)
    result = write(options.result, command, runs)
    options.result.with_suffix(".md").write_text(page(result), encoding="utf-8")
    draw(result, options.result.with_suffix(".png"))
    return 0


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _sizes(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(parametrisation, dim, layers), the smallest models first."""
    width, depth = options.widths[0], options.depths[0]
    sizes = dict.fromkeys([*((one, depth) for one in options.widths), *((width, one) for one in options.depths)])
    return [(name, dim, layers) for dim, layers in sizes for name in NAMES]


def _trained(at: tuple[str, int, int], lr: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs of a size at one rate, one for each seed."""
    name, dim, layers = at
    for seed in range(1, options.seeds + 1):
        run = {"parametrization": name, "optimizer": options.optimizer, "steps": options.steps,
               "dim": dim, "layers": layers, "lr": lr, "seed": seed}  # fmt: skip
        model = _model(name, dim, layers, options.widths[0], options.depths[0])
        folder = options.folder / "-".join(str(value) for value in run.values())
        losses = validation_losses(folder, RECIPE, [*COMMON, *model, *_schedule(options, lr, seed)])
        yield {**run, "loss": list(losses.values())[-1]}


def beyond(row: dict[float, float]) -> float | None:
    """The rate with which to extend a row of losses: beyond the best one, if that is the first or the last."""
    best = min(row, key=lambda lr: row[lr])
    if best == max(row):
        return 2 * best
    return best / 2 if best == min(row) else None


def _model(name: str, dim: int, layers: int, base_dim: int, base_layers: int) -> list[str]:
    values = {"dim": dim, "n_layers": layers, "n_heads": dim // HEAD_DIM, "hidden_dim": HIDDEN * dim}
    if name != "standard":
        values["mup.base_dim"] = base_dim
    if name == "completep":
        values["mup.base_n_layers"] = base_layers
    words = [word for key, value in values.items() for word in (f"--model.{key}", str(value))]
    return [*words, "--model.parametrization", name]


def _schedule(options: argparse.Namespace, lr: float, seed: int) -> list[str]:
    values = {
        "optimizer.name": options.optimizer,
        "optimizer.lr": lr,
        "training.steps": options.steps,
        "validation.freq": max(1, options.steps // 2),  # a curve needs two points
        "lr_scheduler.warmup_steps": max(1, options.steps // 10),
        "debug.seed": seed,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def curves(result: dict[str, Any]) -> dict[tuple[str, int, int], dict[float, float]]:
    """(parametrisation, dim, layers) -> learning rate -> last validation loss, the mean over seeds."""
    found: dict[tuple[str, int, int], dict[float, list[float]]] = {}
    for run in result["runs"]:
        at = (run["parametrization"], run["dim"], run["layers"])
        found.setdefault(at, {}).setdefault(run["lr"], []).append(run["loss"])
    return {at: {lr: statistics.mean(losses) for lr, losses in row.items()} for at, row in found.items()}


def page(result: dict[str, Any]) -> str:
    """The grids, with the best rate of each row, and what the base's best rate costs there."""
    found, first = curves(result), result["runs"][0]
    rates = sorted({run["lr"] for run in result["runs"]})
    lines = [
        "# Learning rates across sizes",
        "",
        f"`{result['command']}`, torch {result['torch']}: validation loss after {first['steps']} steps of 2,048 tokens "
        f"under {first['optimizer']}, annealed. Last column is the loss at the best rate of dim {first['dim']} with "
        f"{first['layers']} layers, less the best of the row; * is at the edge of what was trained.",
    ]
    for name in NAMES:
        rows = {(dim, layers): row for (one, dim, layers), row in found.items() if one == name}
        base = rows.get((first["dim"], first["layers"]), {})
        if not base:
            continue
        transferred = min(base, key=lambda lr: base[lr])
        lines += [
            "",
            f"## {name}",
            "",
            f"| dim | layers | {' | '.join(f'{lr:g}' for lr in rates)} | best | base's rate |",
            "|" + " --- |" * (4 + len(rates)),
        ]
        for (dim, layers), row in rows.items():
            best = min(row, key=lambda lr: row[lr])
            edge = "*" if best in (min(row), max(row)) else ""
            cost = f"{row[transferred] - row[best]:+.3f}" if transferred in row else ""
            losses = " | ".join(f"{row[lr]:.3f}" if lr in row else "" for lr in rates)
            lines.append(f"| {dim} | {layers} | {losses} | {best:g}{edge} | {cost} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], target: Path) -> None:
    """Loss against learning rate: widths above, depths below, a column for each parametrisation."""
    found, first = curves(result), result["runs"][0]
    panels = panels_of(2, len(NAMES), figsize=(3.6 * len(NAMES), 6.0), sharex=True, sharey=True)
    for column, name in enumerate(NAMES):
        for (one, dim, layers), row in found.items():
            for panel, label in ((panels[0][column], f"dim {dim}"), (panels[1][column], f"{layers} layers")):
                other = layers != first["layers"] if panel is panels[0][column] else dim != first["dim"]
                if one == name and not other:
                    panel.plot(sorted(row), [row[lr] for lr in sorted(row)], marker=".", label=label)
        panels[0][column].set_title(name)
        for panel in (panels[0][column], panels[1][column]):
            panel.set_xscale("log", base=2)
            panel.set_xlabel("learning rate")
            panel.grid(alpha=0.25)
            panel.legend(fontsize=7)
    for row in panels:
        row[0].set_ylabel("validation loss")
    save_figure(panels[0][0].figure, target)


if __name__ == "__main__":
    raise SystemExit(main())
