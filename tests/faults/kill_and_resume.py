"""Kills real runs with SIGKILL at random moments and compares what they leave with an unbroken run, bit for bit.

    python -m tests.faults.kill_and_resume [--ranks 1 2] [--kills 6] [--precisions bfloat16 float32]

Every run is `run_train.sh` with the default recipe, shortened, at the default number of threads. In each round all
ranks (or, in every third round, one rank) get SIGKILL at a random moment, and the same command is given again, until it
ends by itself. `metrics.jsonl` without its timings, and every tensor of the last checkpoint, must then be those of a
run that was left alone. Writes `benchmarks/results/kill_and_resume.md`; status 1 when something differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.broken_runs import RESULTS, Launched, differences, last_step
from tests.runs import read_metrics

SHORT: dict[str, Any] = {
    "training.steps": 24,
    "growth.stages.0.at": "12 steps",
    "checkpoint.interval": 5,
    "validation.freq": 8,
    "validation.steps": 1,
    "debug.seed": 1,
    "debug.log_batch_hash": True,
}
RANKS, PRECISIONS = (1, 2), ("bfloat16", "float32")
LIMIT_SECONDS = 600.0


@dataclass
class Killed:
    """A run that was killed and resumed until it came to its end; `wrong` lists how it differs from an unbroken one."""

    ranks: int
    precision: str
    steps: list[int]
    """After which it was killed."""
    statuses: list[int]
    lines: int
    wrong: list[str]


def launch(folder: Path, num_ranks: int, precision: str) -> Launched:
    """Starts, or goes on with, a run of the default recipe."""
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    values = {**SHORT, "training.mixed_precision_param": precision}
    return Launched(folder, num_ranks, values, environ, folder.parent / "screens")


def step_since(folder: Path, since: float) -> int:
    """The last step in metrics.jsonl, or -1 when nothing was written since a time."""
    path = folder / "metrics.jsonl"
    return last_step(folder) if path.exists() and path.stat().st_mtime >= since else -1


def play(num_ranks: int, precision: str, num_kills: int, folder: Path, chance: random.Random) -> Killed:
    """One run, with that many kills if it does not end before."""
    whole = launch(folder / "whole", num_ranks, precision).wait(LIMIT_SECONDS)
    assert whole.status == 0, whole.screen
    broken = folder / "broken"
    steps: list[int] = []
    statuses: list[int] = []
    while True:
        launched, since = launch(broken, num_ranks, precision), time.time()
        target = (steps[-1] if steps else 0) + chance.randint(0, 5)
        while launched.process.poll() is None and not (len(steps) < num_kills and step_since(broken, since) >= target):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1))
        if launched.process.poll() is not None:
            ended = launched.wait(LIMIT_SECONDS)
            assert ended.status == 0, f"ended with {ended.status}:\n{ended.screen}"
            break
        ranks = launched.ranks()
        for pid in ranks[-1:] if len(steps) % 3 == 2 else ranks:
            os.kill(pid, signal.SIGKILL)
        statuses.append(launched.wait(LIMIT_SECONDS).status)
        steps.append(last_step(broken))
    wrong = differences(broken, folder / "whole")
    return Killed(num_ranks, precision, steps, sorted(set(statuses)), len(read_metrics(broken)), wrong)


def page(found: list[Killed], command: str) -> str:
    """The page."""
    lines = [
        "# Killed with SIGKILL at random moments, and resumed",
        "",
        f"`{command}` (the default recipe shortened to {SHORT['training.steps']} steps, growth after "
        f"{SHORT['growth.stages.0.at']}, checkpoints every {SHORT['checkpoint.interval']}, default threads). "
        "Every third kill hits one rank only.",
        "",
        "| ranks | precision | killed at steps | statuses | lines | bitwise equal |",
        "|" + " --- |" * 6,
    ]
    for row in found:
        cells = (row.ranks, row.precision, row.steps, row.statuses, row.lines, "; ".join(row.wrong) or True)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Plays the runs; returns 1 when one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, found = random.Random(options.seed), []
    for num_ranks in options.ranks:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as folder:
                found.append(play(num_ranks, precision, options.kills, Path(folder), chance))
            print(found[-1], flush=True)
    command = f"python -m tests.faults.kill_and_resume --kills {options.kills} --seed {options.seed}"
    (RESULTS / "kill_and_resume.md").write_text(page(found, command))
    return int(any(row.wrong for row in found))


if __name__ == "__main__":
    sys.exit(main())
