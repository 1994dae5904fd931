"""Muon against AdamW at equal steps, both tuned on one grid of learning rates.

    python -m benchmarks.optimizers [--seeds 1] [--layers 6] [--folder outputs/optimizers]

Each run is `benchmarks/growth_pays.toml` without growth: 300 steps of 2,048 tokens under a cosine that ends with them,
in float32. A grid whose best rate is at its edge says nothing about the best one, and the page says so. Finished runs
are not trained again. Writes `benchmarks/results/optimizers.json` and `.md`; losses do not mind what else the machine
does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT, validation_losses, write

RECIPE = ROOT / "benchmarks" / "growth_pays.toml"
RESULT = ROOT / "benchmarks" / "results" / "optimizers.json"
COMMON = [
    "--growth.enable", "false",
    "--training.local_batch_size", "8",
    "--training.global_batch_size", "8",
    "--training.steps", "300",
    "--validation.freq", "100",
    "--validation.steps", "16",
    "--checkpoint.enable", "false",
    "--training.mixed_precision_param", "float32",
    "--metrics.log_freq", "100",
]  # fmt: skip
OPTIMIZERS = ("AdamW", "Muon")
RATES = (2e-3, 4e-3, 8e-3, 16e-3)


def main(argv: list[str] | None = None) -> int:
    """Trains what has not been trained; writes the page after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "optimizers")
    options = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks.optimizers", *(sys.argv[1:] if argv is None else argv)])
    runs: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        for name in OPTIMIZERS:
            for lr in RATES:
                given = ["--optimizer.name", name, "--optimizer.lr", str(lr), "--model.n_layers", str(options.layers)]
                folder = options.folder / f"{options.layers}-{name}-{lr:g}-{seed}"
                losses = validation_losses(folder, RECIPE, [*COMMON, *given, "--debug.seed", str(seed)])
                runs.append({"optimizer": name, "lr": lr, "layers": options.layers, "seed": seed, "losses": losses})
                RESULT.with_suffix(".md").write_text(page(write(RESULT, command, runs)), encoding="utf-8")
    return 0


def page(result: dict[str, Any]) -> str:
    """The grid of last losses, means over seeds, and what the best of each side differ by."""
    found: dict[tuple[str, float], list[float]] = {}
    for run in result["runs"]:
        found.setdefault((run["optimizer"], run["lr"]), []).append(list(run["losses"].values())[-1])
    means = {key: statistics.mean(losses) for key, losses in found.items()}
    lines = [
        "# Muon against AdamW",
        "",
        f"`{result['command']}`, torch {result['torch']}: validation loss after 300 steps of 2,048 tokens, annealed, "
        f"of {result['runs'][0]['layers']} layers of width 128.",
        "",
        f"| optimizer | {' | '.join(f'lr {lr:g}' for lr in RATES)} |",
        "|" + " --- |" * (1 + len(RATES)),
    ]
    best: dict[str, float] = {}
    for name in OPTIMIZERS:
        row = {lr: means[name, lr] for lr in RATES if (name, lr) in means}
        lines.append(f"| {name} | {' | '.join(f'{row[lr]:.3f}' if lr in row else '' for lr in RATES)} |")
        if len(row) == len(RATES):
            rate = min(row, key=lambda lr: row[lr])
            best[name] = row[rate]
            if rate in (RATES[0], RATES[-1]):
                lines.append(f"\n{name}'s best rate is at the edge of the grid: a better one may lie beyond.\n")
    if len(best) == len(OPTIMIZERS):
        lines += ["", f"Best against best: Muon {best['Muon'] - best['AdamW']:+.3f} nats."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
