"""Float8 training against bf16: the same weights and batches, every recipe of scales, alone and in three dimensions.

    python -m benchmarks.float8_loss [--steps 200] [--only alone tensorwise ...]

Every run is `run_train.sh` on the default corpus with a small model: on one rank, and on pp 2 x fsdp 2 x tp 2. Compared
with the bf16 run of the same mesh are the mean loss of the last tenth of the steps and the validation loss at the end;
both must be within 2 %. Writes `benchmarks/results/float8_loss.md`, or with --only prints it.

Without Float8 hardware the products are emulated: operands are cast to 8 bits and back and multiplied in bf16. That
loses what Float8 loses, which is what this shows, and is slow, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.02
COMMON = [
    # Sizes of which every tensor-parallel rank has a multiple of 16, which Float8 products need.
    *("--model.flavor", "custom", "--model.dim", "128", "--model.n_layers", "4", "--model.n_heads", "4"),
    *("--model.hidden_dim", "384", "--model.vocab_size", "2048", "--growth.enable", "false"),
    *("--training.seq_len", "128", "--training.global_batch_size", "8", "--training.local_batch_size", "4"),
    *("--validation.local_batch_size", "8", "--validation.steps", "8"),
    *("--checkpoint.enable", "false", "--metrics.enable_tensorboard", "false", "--debug.seed", "1"),
]
MESHES = {
    "alone": (1, []),
    "pp 2 x fsdp 2 x tp 2": (
        8,
        [
            *("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_microbatch_size", "2"),
            *("--parallelism.tensor_parallel_degree", "2"),
        ],
    ),
}
BASELINE = "bf16"
FLOAT8 = ["--model.converters", "quantize.linear.float8", "--quantize.linear.float8.filter_fqns", "output"]
RECIPES = {
    BASELINE: [],
    **{
        name: [*FLOAT8, "--quantize.linear.float8.recipe_name", name]
        for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp")
    },
}


@dataclass(frozen=True)
class Result:
    """The losses of one run."""

    first: float
    last: float
    """Mean of the last tenth of the steps."""
    validation: float
    seconds: float
    """Of the whole run, start-up included."""


def train(folder: Path, num_ranks: int, steps: int, words: list[str]) -> Result:
    """One run."""
    length = ["--training.steps", str(steps), "--lr_scheduler.warmup_steps", "20", "--validation.freq", str(steps)]
    command = [str(ROOT / "run_train.sh"), *COMMON, *length, "--job.dump_folder", str(folder), *words]
    begin = time.monotonic()
    environment = {**os.environ, "NGPU": str(num_ranks)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nthe run ended with status {done.returncode}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps, f"{len(losses)} losses of {steps} steps"
    validation = next(line["validation_loss"] for line in lines if "validation_loss" in line)
    return Result(losses[0], mean(losses[-max(1, steps // 10) :]), validation, time.monotonic() - begin)


def chosen(only: list[str]) -> list[tuple[str, str]]:
    """(mesh, recipe) of the runs: those with one of the words in their names, each with its baseline."""
    pairs = [(mesh, recipe) for mesh in MESHES for recipe in RECIPES]
    wanted = {pair for pair in pairs if not only or any(word in " ".join(pair) for word in only)}
    wanted |= {(mesh, BASELINE) for mesh, _ in wanted}
    return [pair for pair in pairs if pair in wanted]


def page(results: dict[tuple[str, str], Result], steps: int) -> tuple[str, float]:
    """(the page, the largest relative difference)."""
    rows = []
    worst = 0.0
    for (mesh, recipe), result in results.items():
        bf16 = results[mesh, BASELINE]
        last, validation = result.last / bf16.last - 1, result.validation / bf16.validation - 1
        worst = max(worst, abs(last), abs(validation))
        differences = ("", "") if recipe == BASELINE else (f"{last:+.2%}", f"{validation:+.2%}")
        rows.append(
            f"| {mesh} | {recipe} | {result.first:.4f} | {result.last:.4f} | {differences[0]} "
            f"| {result.validation:.4f} | {differences[1]} | {result.seconds:.0f} |"
        )
    tenth = max(1, steps // 10)
    text = [
        "# Float8 against bf16\n",
        f"`python -m benchmarks.float8_loss --steps {steps}`: {steps} steps of 8 sequences of 128 tokens of the "
        "default corpus, 4 layers of width 128, from the same weights and with the same batches. The head stays in "
        "bf16 (`filter_fqns`), as is usual. Without Float8 hardware the products are emulated: casts to 8 bits and "
        "back, then a bf16 product. Seconds are whole runs with their start-up; they say nothing about the speed of "
        "Float8.\n",
        f"| mesh | recipe | loss, step 1 | loss, last {tenth} steps | to bf16 | validation loss | to bf16 | seconds |",
        "|" + " --- |" * 8,
        *rows,
        f"\nLargest difference from the bf16 run of the same mesh: {worst:.2%} (must be below {TOLERANCE:.0%}).",
    ]
    return "\n".join(text) + "\n", worst


def main() -> int:
    """Runs all; returns 1 when a run is too far from its bf16 run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--only", nargs="+", default=[], help="runs with one of these in mesh or recipe; writes no page"
    )
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (mesh, recipe) in enumerate(chosen(options.only)):
            num_ranks, words = MESHES[mesh]
            result = train(Path(folder) / str(number), num_ranks, options.steps, [*words, *RECIPES[recipe]])
            results[mesh, recipe] = result
            print(f"{mesh}, {recipe}: {result}", flush=True)
    text, worst = page(results, options.steps)
    print(text)
    if not options.only:
        (ROOT / "benchmarks/results/float8_loss.md").write_text(text)
    return int(worst >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
