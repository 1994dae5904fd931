"""Two ways of having ranks for the cases of `throughput.py`, which give the same samples.

ForkedCase      ranks of its own, forked from this process, that wait between the stretches that are timed: every
                case has a clean process, so its peak of memory is its own, and it is built and compiled once
InProcessCase   the process group that there is (torchrun): on GPUs, where one model at a time has to fit, a case is
                built anew for every stretch
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.throughput_running import RankSample, RunningCase
from titan_growth.liveness.exit_report import caused_by_peer
from titan_growth.liveness.stop_signal import signal_on_parent_death
from titan_growth.run.plan import RunPlan
from titan_growth.tools.collectives import gather_objects
from titan_growth.tools.device import Device


class CaseFailedError(Exception):
    """A case that could not be built or run; the message is for the table."""


# ---- ranks of this process group -------------------------------------------------------------------------------------


class InProcessCase:
    """A case on the ranks that there are. Every rank calls the same methods and gets the same samples."""

    def __init__(self, plan: RunPlan, device: Device) -> None:
        self.plan, self.device = plan, device

    def start(self) -> list[RankSample]:
        """Nothing is kept between two measurements."""
        return []

    def measure(self, warmup: int, steps: int) -> list[RankSample]:
        """Builds, measures and drops the model.

        Raises:
            CaseFailedError: on every rank, when all of them failed alike (out of memory, above all). Ranks that fail
                alone leave the others in a collective, which ends the sweep when its time is up.
        """
        sample: RankSample = {}
        error = ""
        with tempfile.TemporaryDirectory() as folder:
            running = None
            try:
                running = RunningCase(self.plan, self.device, Path(folder))
                running.set_up()
                sample = running.measure(warmup, steps)
            except Exception as found:
                error = described(found)
            if running is not None:
                with contextlib.suppress(AttributeError):  # one that failed half-way lacks what was not built
                    running.close()
                running = None
        gc.collect()
        self.device.free_memory()
        if errors := [text for text in gather_objects(error) if text]:
            raise CaseFailedError(errors[0])
        return gather_objects(sample)

    def stop(self) -> None:
        """Nothing is left."""


# ---- ranks of its own ------------------------------------------------------------------------------------------------


class ForkedCase:
    """A case on ranks of its own, on CPUs.

    Forking takes a fraction of a second where starting Python takes many. It must happen before this process has used
    OpenMP threads, which do not survive it; so nothing is computed here.
    """

    def __init__(self, plan: RunPlan, threads: int, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("fork")
        num_ranks = plan.phase.mesh_shape.num_ranks
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            folder = Path(self._folder.name) / str(rank)
            folder.mkdir()
            process = context.Process(
                target=_serve, args=(theirs, plan, rank, num_ranks, threads, folder), daemon=False
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def start(self) -> list[RankSample]:
        """Builds the case and does its first step."""
        return self._call("set_up")

    def measure(self, warmup: int, steps: int) -> list[RankSample]:
        """One timed stretch."""
        return self._call("measure", warmup, steps)

    def _call(self, method: str, *args: int) -> list[RankSample]:
        """Calls a method of `RunningCase` on every rank.

        Raises:
            CaseFailedError: when a rank failed, or time is up. The ranks are gone then.
        """
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that has died is found below
                connection.send((method, args))
        deadline = time.monotonic() + self.timeout_seconds
        answers: dict[int, RankSample] = {}
        while len(answers) < len(self._connections):
            missing = [c for rank, c in enumerate(self._connections) if rank not in answers]
            ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise CaseFailedError(f"not done after {self.timeout_seconds:g} s")
            for one in ready:
                rank = [connection is one for connection in self._connections].index(True)
                try:
                    answers[rank] = self._connections[rank].recv()
                except (EOFError, OSError):
                    raise CaseFailedError(self._failure()) from None
        return [answers[rank] for rank in range(len(answers))]

    def _failure(self) -> str:
        """Ends what is left of the ranks, and says what the first to fail has left as its error."""
        time.sleep(0.5)  # the cause may be another rank that is still writing
        errors = sorted(Path(self._folder.name).glob("*/error"), key=lambda path: path.stat().st_mtime)
        errors += sorted(Path(self._folder.name).glob("*/secondary"))
        message = errors[0].read_text() if errors else f"a rank died: {self._last_words()}"
        self.stop()
        return message

    def _last_words(self) -> str:
        logs = [path.read_text(errors="replace").strip() for path in Path(self._folder.name).glob("*/log")]
        return max((text.splitlines()[-1] for text in logs if text), key=len, default="without a word")

    def stop(self) -> None:
        """Ends the ranks, which hold nothing worth keeping."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        self._folder.cleanup()


def _serve(connection: Connection, plan: RunPlan, rank: int, num_ranks: int, threads: int, folder: Path) -> None:
    """The life of a forked rank: build, then do what is asked for until it is killed."""
    signal_on_parent_death(signal.SIGKILL)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    running = None
    try:
        torch.set_num_threads(threads)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        store = dist.FileStore(str(folder.parent / "store"), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        while True:
            method, args = connection.recv()
            if running is None:
                running = RunningCase(plan, Device.detect(), folder)
            connection.send(getattr(running, method)(*args))
            trim(0)  # many cases wait at the same time: what they do not use belongs to the one that runs
    except Exception as error:
        traceback.print_exc()
        (folder / ("secondary" if caused_by_peer(error) else "error")).write_text(described(error))
        os._exit(1)


def described(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
