"""Ranks that hang, freeze or die in real runs of `run_train.sh`: output, status, and how soon."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import BASE, argv_of, read_metrics, without_timings, write_corpus

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 4

SLEEPER = '''
"""One rank sleeps in a step, in front of everything that the ranks do together."""
import os
import time

from tests.quiet_stage import QuietStage
from titan_growth.stages.order import register_stage


@register_stage
class Sleeper(QuietStage):
    name = "sleeper"

    def before_step(self, parts, context):
        if context.step == 6 and os.environ["RANK"] == "1":
            time.sleep(600)
'''


class Run:
    """A run of the script in a process of its own."""

    def __init__(self, folder: Path, *, num_ranks: int, variables: dict[str, str] | None = None, **more: Any) -> None:
        self.folder = folder
        corpus = folder.parent / "corpus.txt"
        if not corpus.exists():
            write_corpus(corpus)
        values = {
            **BASE,
            "job.dump_folder": str(folder),
            "training.dataset_path": str(corpus),
            "training.global_batch_size": 12,
            "training.steps": 100_000,
            "checkpoint.enable": True,
            "checkpoint.interval": 5,
            "metrics.enable_tensorboard": False,
            "comm.train_timeout_seconds": TIMEOUT_SECONDS,
            **more,
        }
        path = os.pathsep.join([str(folder.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "NGPU": str(num_ranks), "PYTHONPATH": path, **(variables or {})}
        self.output = folder.parent / f"{folder.name}.txt"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                [str(ROOT / "run_train.sh"), *argv_of(values)], env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 90
        metrics = self.folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count('"loss":') >= step):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def pid_of(self, rank: int) -> int:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            pid, parent = line.split()
            if parent == str(self.process.pid):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environment:
                    return int(pid)
        raise AssertionError(f"there is no rank {rank}")

    def finish(self, seconds: float = 120) -> tuple[int, str]:
        """(status, what was printed)."""
        try:
            status = self.process.wait(timeout=seconds)
        finally:
            self.process.kill()
        return status, self.output.read_text()


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_ended(tmp_path: Path) -> None:
    """Its process does not react even to SIGTERM; the message comes within the timeout and a few seconds."""
    run = Run(tmp_path / "run", num_ranks=3)
    run.wait_for_step(12)
    pid = run.pid_of(2)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    status, output = run.finish()
    seconds = time.monotonic() - began
    assert status == 1, output
    assert seconds < TIMEOUT_SECONDS + 12, output
    assert f"rank 2 (pid {pid} on " in output
    assert re.search(r"has not answered for [4-9] s, stopped at step \d+ \(\w+\); the other", output), output
    assert "the other ranks waited in a collective. The last checkpoint is step-" in output
    assert output.count("has not answered") == 1
    assert "Traceback" not in output
    report = json.loads((run.folder / "exit.json").read_text())
    assert report["status"] == 1
    assert "rank 2" in report["message"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_rank_that_is_behind_is_named_with_its_step(tmp_path: Path) -> None:
    """It answers, but its main thread has not reached the collective the others wait in."""
    (tmp_path / "sleeper_plugin.py").write_text(SLEEPER)
    run = Run(tmp_path / "run", num_ranks=3, plugins="sleeper_plugin")
    run.wait_for_step(5)
    began = time.monotonic()
    status, output = run.finish()
    assert status == 1, output
    assert time.monotonic() - began < TIMEOUT_SECONDS + 15, output
    assert "rank 1 (pid" in output
    assert "is behind: at step 6 (train" in output
    assert "The last checkpoint is step-5; run the same command again" in output


@pytest.mark.slow
def test_a_killed_rank_is_reported_by_the_launcher(tmp_path: Path) -> None:
    """The other ranks' errors do not hide it."""
    run = Run(tmp_path / "run", num_ranks=2)
    run.wait_for_step(8)
    os.kill(run.pid_of(1), signal.SIGKILL)
    status, output = run.finish()
    assert status == 1, output
    assert output.rstrip().endswith(
        "rank 1 was killed by signal 9 (SIGKILL); run the same command again to resume from the last checkpoint"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "killed"), [(2, 1), (4, 0)])
def test_a_restart_heals_a_killed_rank(num_ranks: int, killed: int, tmp_path: Path) -> None:
    """MAX_RESTARTS resumes from the last checkpoint by itself, to the numbers of an unbroken run."""
    settings = {"training.steps": 60, "training.global_batch_size": 8, "growth.stages.0.at": "20 steps"}
    settings["comm.train_timeout_seconds"] = 60
    broken = Run(tmp_path / "broken", num_ranks=num_ranks, variables={"MAX_RESTARTS": "2"}, **settings)
    broken.wait_for_step(26 if killed else 12)
    os.kill(broken.pid_of(killed), signal.SIGKILL)
    status, output = broken.finish()
    assert status == 0, output
    assert "resumed from" in output
    whole = Run(tmp_path / "whole", num_ranks=num_ranks, **settings)
    assert whole.finish()[0] == 0
    assert without_timings(read_metrics(broken.folder)) == without_timings(read_metrics(whole.folder))


@pytest.mark.slow
def test_a_time_limit_ends_the_script_with_75(tmp_path: Path) -> None:
    """And the message gives the reason."""
    run = Run(tmp_path / "run", num_ranks=2, **{"job.time_limit_seconds": 10})
    status, output = run.finish()
    assert status == 75, output
    assert "and saved (job.time_limit_seconds = 10 is over); run the same command again to continue" in output
