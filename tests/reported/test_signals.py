"""Reports about signals and processes that are gone: who gets a signal, what is saved, what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.reported.corpora import Epochs
from tests.runs import BASE, argv_of, read_metrics, write_corpus
from tests.unit.data.test_loader import children
from titan_growth.liveness.exit_report import caused_by_peer, lost_worker, stop_watching_workers
from titan_growth.liveness.stop_signal import STOP_SIGNALS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
RUN: dict[str, Any] = {
    **BASE,
    "training.steps": 100_000,
    "training.dataloader.num_workers": 2,
    "checkpoint.enable": True,
    "checkpoint.interval": 100_000,
}


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory) -> Epochs:
    return Epochs(tmp_path_factory.mktemp("epochs"))


def test_kempnerforge_177_workers_outlive_the_signals_that_stop_a_run(epochs: Epochs) -> None:
    before = set(children(os.getpid()))
    loader = epochs.loader(num_workers=2)
    seen = epochs.numbers(loader, 1)
    workers = set(children(os.getpid())) - before
    assert len(workers) >= 2
    for number in STOP_SIGNALS:
        for worker in workers:
            os.kill(worker, number)
        seen += epochs.numbers(loader, 2)
    assert seen == epochs.order(8 * (1 + 2 * len(STOP_SIGNALS)))
    loader.close()


def _with_a_killed_worker(rank: int, epochs: Epochs) -> tuple[str | None, bool]:
    """What is made of the error. Not in pytest's own process: PyTorch raises it wherever that happens to be."""
    loader = epochs.loader(num_workers=1)
    epochs.numbers(loader, 1)
    try:
        try:
            os.kill(children(os.getpid())[0], signal.SIGKILL)
            epochs.numbers(loader, 20)
            time.sleep(10)
        finally:
            stop_watching_workers()
    except RuntimeError as error:
        return lost_worker(error), caused_by_peer(error)
    return None, False


def test_pytorch_8976_a_worker_that_was_killed_is_told_from_a_lost_rank(epochs: Epochs) -> None:
    ((found, as_a_rank),) = run_ranks(_with_a_killed_worker, 1, epochs)
    assert (found or "").startswith("DataLoader worker (pid")
    assert not as_a_rank
    assert lost_worker(RuntimeError("Connection closed by peer")) is None


def started(folder: Path) -> subprocess.Popen[str]:
    """A run with workers in a session of its own, a few steps after its start."""
    corpus = write_corpus(folder / "corpus.txt")
    words = argv_of({**RUN, "job.dump_folder": str(folder / "run"), "training.dataset_path": str(corpus)})
    command = [sys.executable, "-m", "titan_growth.train", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process: subprocess.Popen[str] = subprocess.Popen(command, start_new_session=True, **pipes)
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_kempnerforge_177_a_signal_to_all_processes_of_a_run(number: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["status"] == 75
    assert (tmp_path / "run" / "checkpoint" / f"step-{step}" / "manifest.json").is_file()
    assert "Traceback" not in output


@pytest.mark.slow
def test_pytorch_8976_a_run_whose_worker_was_killed_says_so(tmp_path: Path) -> None:
    process = started(tmp_path)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "error: rank 0: a process that loads data is gone (DataLoader worker (pid" in output
    assert "If memory is short, lower training.dataloader.num_workers. The last checkpoint is intact" in output
    assert "Traceback" not in output
