"""Does growing pay? One recipe with and without growth, validation loss against FLOPs, tokens and seconds.

    python -m benchmarks.growth_pays [--seeds 1] [--at 200 500] [--folder outputs/growth_pays]

Trains `benchmarks/growth_pays.toml` through `run_train.sh`: grown from 3 to 12 layers, early and late, and with
`--growth.enable false`, which trains the 12 layers from scratch on the same batches with the same learning rates. All
schedules end annealed at the same step. The runs are resumable: stop this command, give it again, and it goes on.

Then `titan_growth plot` draws the first seed into `docs/growth_pays.png`, and the numbers of all seeds go to
`benchmarks/results/growth_pays.md` and into the README, between its two `growth_pays` marks. Let nothing else run:
seconds are part of the comparison.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from titan_growth.commands.plot import main as plot
from titan_growth.config.loader import load_recipe
from titan_growth.metrics.curves import COSTS, Comparison, compare, read_curve
from titan_growth.models.registry import model_config_of
from titan_growth.tools.findings import Findings

ROOT = Path(__file__).resolve().parents[1]

RECIPE = ROOT / "benchmarks" / "growth_pays.toml"
RESULT = ROOT / "benchmarks" / "results" / "growth_pays.md"
PICTURE = ROOT / "docs" / "growth_pays.png"
README = ROOT / "README.md"
BASELINE = "from scratch"
PAPER = "| Du et al., 7B | equal | 54.6%: 300B tokens against 194B, minus one | 35.3% |"
"""A speedup of 54.6 % is 35.3 % less work, not 54.6 % less."""
BEGIN, END = "<!-- growth_pays: written by benchmarks/growth_pays.py -->", "<!-- end of growth_pays -->"


def train(folder: Path, seed: int, words: tuple[str, ...]) -> None:
    """Trains a run to its end, or on from where it stopped."""
    command = [str(ROOT / "run_train.sh"), "--job.dump_folder", str(folder), "--debug.seed", str(seed), *words]
    subprocess.run(command, env={**os.environ, "CONFIG_FILE": str(RECIPE), "NGPU": "1"}, check=True)


def row(seed: int, one: Comparison) -> str:
    """A line of the table."""
    losses = [f"{curve.points[-1].loss:.4f}" for curve in (one.baseline, one.other)]
    speedups = [f"{one.speedup(cost):+.0%}" for cost in COSTS]
    costs = [f"{pair[0]:.3g} -> {pair[1]:.3g}" for pair in (one.costs[cost] for cost in COSTS)]
    cells = [one.other.name, str(seed), *losses, f"{one.loss:.4f}", *costs, *speedups]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Trains what has not been trained, draws, writes the page and the README's paragraph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--at", type=int, nargs="+", default=[200, 500], help="steps to grow at, a run for each")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "growth_pays")
    options = parser.parse_args(argv)
    runs = {BASELINE: ("--growth.enable", "false")}
    runs |= {f"grown at step {step}": ("--growth.stages.0.at", f"{step} steps") for step in options.at}
    rows: dict[int, list[Comparison]] = {}
    for seed in range(1, options.seeds + 1):
        folders = {name: options.folder / f"{name.replace(' ', '_')}-{seed}" for name in runs}
        for name, words in runs.items():
            train(folders[name], seed, words)
        curves = [read_curve(name, folder) for name, folder in folders.items()]
        rows[seed] = [compare(curves[0], other) for other in curves[1:]]
        if seed == 1:
            named = [f"{name}={folder}" for name, folder in folders.items()]
            assert plot([*named, "--to", str(PICTURE)]) == 0
    given = argv if argv is not None else sys.argv[1:]
    write(rows, " ".join(["python -m benchmarks.growth_pays", *given]))
    return 0


def write(rows: dict[int, list[Comparison]], command: str) -> None:
    """The page, and the paragraph of the README."""
    comparisons = [one for each in rows.values() for one in each]
    first = comparisons[0]
    small, large = first.other.growths[0].from_layers, first.other.growths[0].to_layers
    tokens = f"{first.other.points[-1].cost['tokens'] / 1e6:.1f}M tokens"
    curves = [curve for each in rows.values() for curve in (each[0].baseline, *(one.other for one in each))]
    minutes = sum(curve.points[-1].cost["seconds"] for curve in curves) / 60
    setting = (
        f"`{command}`, {minutes:.0f} minutes of training on {os.cpu_count()} cores: `benchmarks/growth_pays.toml` with "
        f"and without growth, {_seeds(rows)}, {tokens} of the default corpus, one pass. A grown run has {small} layers "
        f"at first and {large} from its growth on (G_stack, moments reset, learning rate restarted); the baseline has "
        f"{large} from the start. Same batches, same peak learning rate, same cosine to the same last step."
    )
    meaning = (
        "Costs are those of the whole run until the lowest validation loss that both reach, the small model's share "
        "included; speedup is the baseline's cost over the grown run's, minus one."
    )
    limits = (
        "What this does not say: neither run was tuned, the learning rate is the same for both depths, and a model of "
        f"{_num_params():,} parameters on {tokens} is far from the scales that the paper measured."
    )
    columns = ["run", "seed", "from scratch, last", "grown, last", "at equal loss", "FLOPs", "tokens", "seconds"]
    columns += ["speedup in FLOPs", "in tokens", "in seconds"]
    table = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    table += [row(seed, one) for seed, each in rows.items() for one in each]
    picture = "![validation loss against FLOPs, tokens and seconds]"
    page = ["# Does growing pay?", setting, meaning, "\n".join(table), f"{picture}(../../docs/growth_pays.png)", limits]
    RESULT.write_text("\n\n".join(page) + "\n", encoding="utf-8")

    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = f"{picture}(docs/growth_pays.png)\n\n{readme_block(rows)}"
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def readme_block(rows: dict[int, list[Comparison]]) -> str:
    """Our numbers beside the paper's, and what they are of."""
    first = rows[1][0].other
    table = ["| against training from scratch | last loss | speedup at equal loss | FLOPs saved |"]
    table += ["| --- | --- | --- | --- |", PAPER]
    for index, one in enumerate(rows[1]):
        flops, tokens, seconds = (_range([each[index].speedup(cost) for each in rows.values()]) for cost in COSTS)
        saved = _range([1 - each[index].costs["flops"][1] / each[index].costs["flops"][0] for each in rows.values()])
        losses = f"{one.other.points[-1].loss:.4f} against {one.baseline.points[-1].loss:.4f}"
        speedups = f"{flops} in FLOPs, {tokens} in tokens, {seconds} in seconds"
        table.append(f"| measured here, {one.other.name} | {losses} | {speedups} | {saved} |")
    setting = (
        f"Here: {first.growths[0].to_layers} layers of width 128, grown from {first.growths[0].from_layers}, on "
        f"{first.points[-1].cost['tokens'] / 1e6:.1f}M tokens of the default corpus ({_seeds(rows)}), far below the "
        "paper's scale. Speedup is the baseline's cost over the grown run's at equal validation loss, minus one; the "
        "small model's cost is included. `python -m benchmarks.growth_pays` trains the runs, draws the picture and "
        "writes these numbers."
    )
    limits = "[What they do and do not say](benchmarks/results/growth_pays.md)."
    return "\n".join([*table, "", textwrap.fill(setting, width=120, break_on_hyphens=False), limits])


def _seeds(rows: dict[int, list[Comparison]]) -> str:
    return f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"


def _num_params() -> int:
    config = model_config_of(load_recipe(["--job.config_file", str(RECIPE)]).model, found := Findings())
    assert config is not None, found.problems
    return config.num_params


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0%}" if len(values) == 1 else f"{low:.0%} to {high:.0%}"


if __name__ == "__main__":
    sys.exit(main())
