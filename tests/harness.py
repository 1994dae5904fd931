"""Running a function on several gloo ranks, forked from this process.

Forking from a parent that has imported `torch.distributed` costs 0.3 s for 8 ranks; spawning costs a minute.
A rank that fails reports its traceback, and the others are killed at once.

`run_ranks` forks for one call. `WarmRanks` keeps the ranks for the calls that follow: DTensor's sharding rules and the
meshes are cached in a process, so the second run of a mesh takes half the time of the first.

Time limits are for a machine that does nothing else. Where it does, `TEST_PATIENCE=4` makes them four times as long.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))
"""What limits of tests, in seconds, are multiplied by; not those of the product, which tests set on purpose."""

# Autograd starts a thread per device in its first backward pass, and then none can run in a forked process. FakeTensors
# make PyTorch's CUDA builds count 8 devices where there are none: the first backward pass comes before them.
if not torch.cuda.is_available():
    torch.ones(1, requires_grad=True).sum().backward()


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_seconds: float = 90) -> list[Any]:
    """Calls `function(rank, *args)` on every rank inside a process group; returns the (picklable) results by rank.

    Raises:
        AssertionError: with the tracebacks of the ranks that failed, or when time is up.
    """
    ranks = Ranks(num_ranks)
    try:
        return ranks.run(function, *args, timeout_seconds=timeout_seconds)
    finally:
        ranks.close()


class WarmRanks:
    """Called like `run_ranks`; ranks are kept for the next call, unless a call failed."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def __call__(
        self, function: Callable[..., Any], num_ranks: int, *args: Any, timeout_seconds: float = 90
    ) -> list[Any]:
        if num_ranks not in self._ranks:
            self._ranks[num_ranks] = Ranks(num_ranks)
        try:
            return self._ranks[num_ranks].run(function, *args, timeout_seconds=timeout_seconds)
        except BaseException:
            self._ranks.pop(num_ranks).close()
            raise

    def close(self) -> None:
        """Ends all ranks."""
        while self._ranks:
            self._ranks.popitem()[1].close()


class Ranks:
    """Processes that are the ranks of one process group."""

    def __init__(self, num_ranks: int) -> None:
        self._context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(num_ranks):
            pipe, end_of_rank = self._context.Pipe()
            process = self._context.Process(
                target=_rank, args=(rank, num_ranks, self._folder.name, end_of_rank, os.getpid()), daemon=False
            )
            process.start()
            end_of_rank.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(pipe)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Their process numbers, by rank."""
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *args: Any, timeout_seconds: float = 90) -> list[Any]:
        """`function(rank, *args)` on every rank; after a failure the ranks must be closed."""
        job = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        rank_of = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        timeout_seconds *= PATIENCE
        deadline = time.monotonic() + timeout_seconds
        while rank_of and time.monotonic() < deadline:
            for pipe in wait(list(rank_of), timeout=max(0.0, deadline - time.monotonic())):
                assert isinstance(pipe, Connection)
                rank = rank_of.pop(pipe)
                try:
                    succeeded, results[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join()
                    succeeded, results[rank] = False, f"rank {rank} ended with {self._processes[rank].exitcode}"
                if not succeeded:
                    if not failures:  # the cause may be another rank that is still writing its report
                        deadline = min(deadline, time.monotonic() + 0.5)
                    failures[rank] = results[rank]
        if failures:
            raise AssertionError("\n".join(failures.values()))
        if rank_of:
            raise AssertionError(f"{len(results)} of {len(self._pipes)} ranks were done within {timeout_seconds:g} s")
        return [results[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """Ends the ranks, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _rank(rank: int, num_ranks: int, folder: str, pipe: Connection, parent: int) -> None:
    """The life of a rank: one job after another, until one fails or the parent ends it."""
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        store = dist.FileStore(f"{folder}/store", num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        while True:
            while not pipe.poll(5):
                if os.getppid() != parent:
                    os._exit(1)
            function, args = pickle.loads(pipe.recv_bytes())
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()  # there is a limit to how often it compiles a function in one process
            result = pickle.dumps((True, function(rank, *args)))
            dist.barrier()
            pipe.send_bytes(result)
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, f"--- rank {rank}\n{traceback.format_exc()}")))
        # Skip interpreter shutdown: what the parent had open is not the child's to close.
        os._exit(1)
