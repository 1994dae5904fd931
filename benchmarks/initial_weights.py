"""Which initial weights suit which depth? One suspect at a time, on a base of 3 layers and on its target of 12.

    python -m benchmarks.initial_weights [--seeds 1] [--layers 3 12] [--folder outputs/initial_weights]

Each arm is `benchmarks/growth_pays.toml` without growth, 200 steps of 2,048 tokens under the first part of a cosine of
1,000, in float32, and differs from "as it was" (the default up to 0.2.0) in one thing. Validation losses are of 128
sequences. Finished runs are not trained again. Writes `benchmarks/results/initial_weights.json` and `.md`; losses do
not mind what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT, validation_losses, write

RECIPE = ROOT / "benchmarks" / "growth_pays.toml"
RESULT = ROOT / "benchmarks" / "results" / "initial_weights.json"
COMMON = [
    "--growth.enable", "false",
    "--training.local_batch_size", "8",
    "--training.global_batch_size", "8",
    "--optimizer.lr", "2e-3",
    "--training.steps", "200",
    "--lr_scheduler.total_steps", "1000",
    "--validation.freq", "50",
    "--validation.steps", "8",
    "--checkpoint.enable", "false",
    "--training.mixed_precision_param", "float32",
    "--metrics.log_freq", "50",
]  # fmt: skip
SCALED = "--model.rope_scaling_factor 8"
"""Llama 3.1's scaling, on by default up to 0.2.0."""
ARMS = {
    "as it was": SCALED,
    "rotary frequencies not scaled": "--model.rope_scaling_factor 1",
    "embedding 0.02": f"{SCALED} --model.init.embedding_std 0.02",
    "head 0.02": f"{SCALED} --model.init.head_std 0.02",
    "4 heads": f"{SCALED} --model.n_heads 4",
    "embedding 1/sqrt(dim)": f"{SCALED} --model.init.scheme small",
    "not scaled, embedding 1/sqrt(dim)": "--model.rope_scaling_factor 1 --model.init.scheme small",
    "not scaled, embedding and head 0.02": "--model.rope_scaling_factor 1 --model.init.embedding_std 0.02 "
    "--model.init.head_std 0.02",
    "all 0.02, not scaled": "--model.rope_scaling_factor 1 --model.init.scheme normal",
}
"""What an arm changes, beside `COMMON`."""


def main(argv: list[str] | None = None) -> int:
    """Trains what has not been trained; writes the page after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "initial_weights")
    options = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks.initial_weights", *(sys.argv[1:] if argv is None else argv)])
    runs: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        for num_layers in options.layers:
            for number, (arm, words) in enumerate(ARMS.items()):
                given = [*words.split(), "--model.n_layers", str(num_layers), "--debug.seed", str(seed)]
                folder = options.folder / f"{num_layers}-{number}-{seed}"
                losses = validation_losses(folder, RECIPE, [*COMMON, *given])
                runs.append({"arm": arm, "layers": num_layers, "seed": seed, "words": given, "losses": losses})
                result = write(RESULT, command, runs)
                RESULT.with_suffix(".md").write_text(page(result), encoding="utf-8")
    return 0


def page(result: dict[str, Any]) -> str:
    """The table: last loss of each arm and depth, and its distance from "as it was"; means over seeds."""
    found: dict[tuple[str, int], list[float]] = {}
    for run in result["runs"]:
        found.setdefault((run["arm"], run["layers"]), []).append(list(run["losses"].values())[-1])
    depths = sorted({depth for _, depth in found})
    lines = [
        "# Which initial weights suit which depth?",
        "",
        f"`{result['command']}`, torch {result['torch']}: validation loss after 200 steps of 2,048 tokens, and in "
        'brackets how far it is from that of "as it was", the default up to 0.2.0, from which each arm differs in what '
        "it is called.",
        "",
        f"| arm | {' | '.join(f'{depth} layers' for depth in depths)} |",
        "|" + " --- |" * (1 + len(depths)),
    ]
    for arm in ARMS:
        cells = []
        for depth in depths:
            if (arm, depth) in found:
                loss = statistics.mean(found[arm, depth])
                cells.append(f"{loss:.3f} ({loss - statistics.mean(found['as it was', depth]):+.3f})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
