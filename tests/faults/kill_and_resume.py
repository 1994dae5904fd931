"""Kills real runs with SIGKILL at random moments and compares what they leave with an unbroken run, bit for bit.

    python -m tests.faults.kill_and_resume [--ranks 1 2] [--kills 6] [--precisions bfloat16 float32]

Every run is `run_train.sh` with the default recipe, shortened, at the default number of threads. In each round all
ranks (or, in every third round, one rank) get SIGKILL at a random moment, and the same command is given again, until it
ends by itself. `metrics.jsonl` without its timings must then be that of a run that nobody touched. Writes
`benchmarks/results/kill_and_resume.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = ("seconds", "tokens_per_second", "mfu")
SHORT = [
    *("--training.steps", "24", "--growth.stages.0.at", "12 steps", "--checkpoint.interval", "5"),
    *("--validation.freq", "8", "--validation.steps", "1", "--debug.seed", "1", "--debug.log_batch_hash"),
]


def command(folder: Path, precision: str) -> list[str]:
    words = [str(ROOT / "run_train.sh"), *SHORT, "--job.dump_folder", str(folder)]
    return [*words, "--training.mixed_precision_param", precision]


def descendants(parent: int) -> list[int]:
    """Processes below a process, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [parent]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def ranks_of(launcher: int) -> list[int]:
    """The processes of the ranks."""
    pids = []
    for pid in descendants(launcher):
        try:
            if b"titan_growth.train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                pids.append(pid)
        except OSError:
            continue
    return pids


def metrics(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def last_step(folder: Path, since: float) -> int:
    """The last step in metrics.jsonl, or -1 when nothing was written since a time."""
    path = folder / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime < since:
        return -1
    return max(
        (int(json.loads(line)["step"]) for line in path.read_text().splitlines() if line.endswith("}")), default=-1
    )


def one_case(num_ranks: int, precision: str, num_kills: int, folder: Path) -> dict[str, object]:
    environment = {**os.environ, "NGPU": str(num_ranks)}
    log = open(folder / "log.txt", "w")  # noqa: SIM115
    subprocess.run(command(folder / "whole", precision), env=environment, stdout=log, stderr=log, check=True)
    broken = folder / "broken"
    steps_at_kill: list[int] = []
    statuses: list[int] = []
    while True:
        process = subprocess.Popen(command(broken, precision), env=environment, stdout=log, stderr=log)
        started = time.time()
        target = (steps_at_kill[-1] if steps_at_kill else 0) + random.randint(0, 5)
        while process.poll() is None and not (len(steps_at_kill) < num_kills and last_step(broken, started) >= target):
            time.sleep(0.02)
        time.sleep(random.uniform(0, 1))
        if process.poll() is not None:
            assert process.returncode == 0, f"ended with {process.returncode}, see {folder}/log.txt"
            break
        victims = ranks_of(process.pid)
        if len(steps_at_kill) % 3 == 2:
            victims = victims[-1:]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        statuses.append(process.wait())
        steps_at_kill.append(max(0, last_step(broken, 0)))
    return {
        "ranks": num_ranks,
        "precision": precision,
        "killed at steps": steps_at_kill,
        "statuses": sorted(set(statuses)),
        "lines": len(metrics(broken)),
        "bitwise equal": metrics(broken) == metrics(folder / "whole"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    rows = []
    for num_ranks in options.ranks:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one_case(num_ranks, precision, options.kills, Path(folder)))
                print(rows[-1], flush=True)
    header = list(rows[0])
    text = [
        "# Killed with SIGKILL at random moments, and resumed\n",
        f"`python -m tests.faults.kill_and_resume --kills {options.kills} --seed {options.seed}` "
        "(the default recipe shortened to 24 steps, growth after 12, checkpoints every 5, default threads). "
        "Every third kill hits one rank only.\n",
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(str(row[key]) for key in header) + " |" for row in rows),
    ]
    (ROOT / "benchmarks/results/kill_and_resume.md").write_text("\n".join(text) + "\n")
    assert all(row["bitwise equal"] for row in rows)


if __name__ == "__main__":
    main()
