"""Loss, gradient norm and validation loss of every mesh against one rank: same weights, same global batches, fp32.

    python -m tests.faults.parity [--steps 10] [--only "tp2"]

First the meshes of `tests/distributed/meshes.py` with the small model of the tests. Then `run_train.sh` with the
default recipe at 3 layers on a few of them; and one such run is stopped and resumed on other meshes and numbers of
ranks, where the hashes of its global batches are set beside those of one rank. Writes `benchmarks/results/parity.md`:
the largest relative difference of step 1 (must be below 1e-5) and of all steps (must be below 1e-4); status 1 when one
is not. Takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import conftest  # noqa: F401  (imports what forked ranks need)
from tests.distributed.meshes import MESHES, ONE_RANK
from tests.faults.broken_runs import RESULTS, ROOT
from tests.harness import WarmRanks
from tests.runs import NUMBERS, make_recipe, read_metrics, relative_difference, train

STEPS = 10
FIRST, LATER = 1e-5, 1e-4

Lines = list[dict[str, Any]]

COMMON = [
    *("--model.n_layers", "3", "--growth.enable", "false", "--training.mixed_precision_param", "float32"),
    *("--debug.seed", "1", "--debug.log_batch_hash", "--validation.freq", "5", "--validation.steps", "1"),
    *("--metrics.enable_tensorboard", "false"),
]
REAL_MESHES: dict[str, tuple[int, dict[str, int]]] = {
    "fsdp2": (2, {}),
    "fsdp8": (8, {}),
    "hsdp 2x2": (4, {"data_parallel_replicate": 2}),
    "tp2": (2, {"tensor_parallel": 2}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "cp2": (2, {"context_parallel": 2}),
    "pp2 x fsdp2 x tp2": (8, {"pipeline_parallel": 2, "tensor_parallel": 2}),
}
MOVES = ("hsdp 2x2", "tp2", "pp2", "pp2 x fsdp2 x tp2")
"""Where the run that moves trains an equal share of its steps."""


@dataclass
class Comparison:
    """A mesh beside one rank."""

    name: str
    num_ranks: int
    first: float
    """Of step 1, the largest relative difference of loss and gradient norm."""
    largest: dict[str, float]
    """Of all steps, by number."""

    @property
    def holds(self) -> bool:
        return self.first <= FIRST and all(difference <= LATER for difference in self.largest.values())


def compare(name: str, num_ranks: int, found: Lines, expected: Lines) -> Comparison:
    pairs = list(zip(found, expected, strict=True))
    assert all(line["step"] == reference["step"] for line, reference in pairs), f"{name}: other steps"
    largest = {
        key: max(relative_difference(line, reference, key) for line, reference in pairs if key in reference)
        for key in NUMBERS
    }
    first = max(relative_difference(found[0], expected[0], key) for key in ("loss", "grad_norm"))
    return Comparison(name, num_ranks, first, largest)


HEADER = ["| mesh | ranks | step 1 | loss | gradient norm | validation loss |", "|" + " --- |" * 6]


def row(comparison: Comparison) -> str:
    numbers = [comparison.first, *(comparison.largest[key] for key in NUMBERS)]
    cells = [comparison.name, str(comparison.num_ranks), *(f"{number:.1e}" for number in numbers)]
    return f"| {' | '.join(cells)} |"


def small_model(folder: Path, steps: int, chosen: Callable[[str], bool]) -> Iterator[Comparison]:
    """Every mesh with the recipe of the tests; ranks stay from one run to the next."""
    ranks = WarmRanks()
    validation = {"validation__enable": True, "validation__freq": 5, "validation__steps": 5}
    known: dict[str, Lines] = {}

    def lines_of(name: str, num_ranks: int, **settings: Any) -> Lines:
        run = folder / name.replace(" ", "_").replace(":", "")
        recipe = make_recipe(run, training__steps=steps, **validation, **settings)
        ranks(train, num_ranks, num_ranks, recipe, timeout_seconds=900)
        return read_metrics(run)

    try:
        for name, case in MESHES.items():
            if chosen(name):
                model = json.dumps(case.model, sort_keys=True)
                if model not in known:
                    known[model] = lines_of(f"one rank {len(known)}", 1, **ONE_RANK.layout, **case.model)
                found = lines_of(name, case.num_ranks, **case.layout, **case.model)
                yield compare(name, case.num_ranks, found, known[model])
    finally:
        ranks.close()


def run_train(folder: Path, num_ranks: int, *words: str) -> Lines:
    """The default recipe at 3 layers through `run_train.sh`."""
    command = [str(ROOT / "run_train.sh"), *COMMON, "--job.dump_folder", str(folder), *words]
    environment = {**os.environ, "NGPU": str(num_ranks)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder)


def words_of(degrees: dict[str, int]) -> list[str]:
    """Degrees as words. A pipeline needs a sequence for each of its parts; the default recipe has one at a time."""
    words = [word for name, degree in degrees.items() for word in (f"--parallelism.{name}_degree", str(degree))]
    num_parts = degrees.get("pipeline_parallel")
    return [*words, "--training.local_batch_size", str(num_parts)] if num_parts else words


@dataclass(frozen=True)
class Pair:
    """A step of the run that moves, and the same step on one rank."""

    found: dict[str, Any]
    expected: dict[str, Any]

    @property
    def same_batch(self) -> bool:
        return self.found["batch_hash"] == self.expected["batch_hash"]

    @property
    def holds(self) -> bool:
        return self.same_batch and relative_difference(self.found, self.expected, "loss") <= LATER


class DefaultRecipe:
    """Runs of the default recipe on real meshes, and on one rank to compare with, which is trained once."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self.steps = steps
        self.words = ("--training.steps", str(steps), "--checkpoint.enable", "false")

    @functools.cached_property
    def one_rank(self) -> Lines:
        return run_train(self.folder / "one", 1, *self.words)

    def on(self, name: str) -> Comparison:
        """One mesh beside one rank."""
        num_ranks, degrees = REAL_MESHES[name]
        found = run_train(self.folder / name.replace(" ", "_"), num_ranks, *self.words, *words_of(degrees))
        return compare(name, num_ranks, found, self.one_rank)

    def moved(self) -> list[Pair]:
        """All steps of one run that is stopped and resumed on mesh after mesh."""
        lines: Lines = []
        for position, name in enumerate(MOVES, start=1):
            num_ranks, degrees = REAL_MESHES[name]
            until = ("--lr_scheduler.total_steps", str(self.steps))
            until += ("--training.steps", str(self.steps * position // len(MOVES)))
            lines = run_train(self.folder / "moved", num_ranks, *until, *words_of(degrees))
        found, expected = ([line for line in run if "loss" in line] for run in (lines, self.one_rank))
        return [Pair(*pair) for pair in zip(found, expected, strict=True)]


def page_of_the_move(pairs: list[Pair]) -> list[str]:
    """The steps of the run that moves."""
    text = [
        "\n## One run, stopped and resumed on mesh after mesh\n",
        f"An equal share of the {len(pairs)} steps on {', then '.join(MOVES)}. The hashes of all global batches "
        f"equal those of one rank: {all(pair.same_batch for pair in pairs)}.\n",
        "| step | loss | loss on one rank | hash | hash on one rank |",
        "|" + " --- |" * 5,
    ]
    for pair in pairs:
        line, other = pair.found, pair.expected
        hashes = f"`{line['batch_hash'][:12]}` | `{other['batch_hash'][:12]}`"
        text.append(f"| {line['step']} | {line['loss']:.6f} | {other['loss']:.6f} | {hashes} |")
    return text


def main() -> int:
    """Trains them all; returns 1 when one is outside of the tolerances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="meshes whose name holds this; writes nothing")
    options = parser.parse_args()
    steps, failed = options.steps, []
    text = [
        "# Parity of meshes with one rank, fp32\n",
        f"`python -m tests.faults.parity --steps {steps}`: largest relative differences, of step 1 (loss and gradient "
        f"norm) and of all {steps} steps. Weights and global batches are equal. Tolerances: {FIRST:g} and {LATER:g}.\n",
        "## Every mesh, small model\n",
        "The recipe of `tests/runs.py` on the meshes of `tests/distributed/meshes.py`: 4 layers of 32 channels unless "
        "the name says otherwise, 8 sequences of 32 tokens a step, 40 held-out ones at every fifth step.\n",
        *HEADER,
    ]

    def add(comparison: Comparison) -> None:
        text.append(row(comparison))
        print(text[-1], flush=True)
        if not comparison.holds:
            failed.append(comparison.name)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ.setdefault("TITAN_GROWTH_CACHE", str(folder / "cache"))
        (folder / "small").mkdir()
        for comparison in small_model(folder / "small", steps, lambda name: options.only in name):
            add(comparison)
        if not options.only:
            default = DefaultRecipe(folder, steps)
            text += ["\n## The default recipe at 3 layers, through `run_train.sh`\n", *HEADER]
            for name in REAL_MESHES:
                add(default.on(name))
            pairs = default.moved()
            failed += [f"step {pair.found['step']} of the run that moved" for pair in pairs if not pair.holds]
            (RESULTS / "parity.md").write_text("\n".join([*text, *page_of_the_move(pairs)]) + "\n")
    if failed:
        print(f"outside of the tolerances: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
