"""Running a function on several gloo ranks, forked from this process.

Forking from a parent that has imported `torch.distributed` costs 0.3 s for 8 ranks; spawning costs a minute (design.md,
section 6). A rank that fails reports its traceback, and the others are killed at once.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_seconds: float = 90) -> list[Any]:
    """Calls `function(rank, *args)` on every rank inside a process group; returns the (picklable) results by rank.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or when time is up.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, rank, num_ranks, folder, args), daemon=False)
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(process.is_alive() for process in ranks):
                failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
                if failed:
                    time.sleep(0.2)  # the cause may be another rank that is still writing its report
                    raise AssertionError(_reports(Path(folder), ranks))
                if time.monotonic() > deadline:
                    raise AssertionError(f"{num_ranks} ranks did not end within {timeout_seconds} s")
                time.sleep(0.01)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        if any(process.exitcode for process in ranks):
            raise AssertionError(_reports(Path(folder), ranks))
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(num_ranks)]


def _reports(folder: Path, ranks: list[Any]) -> str:
    texts = [f"rank {rank} ended with {process.exitcode}" for rank, process in enumerate(ranks) if process.exitcode]
    texts += [path.read_text() for path in sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime)]
    return "\n".join(texts)


def _rank(function: Callable[..., Any], rank: int, num_ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    status = 0
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        store = dist.FileStore(f"{folder}/store", num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        result = function(rank, *args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(f"--- rank {rank}\n{traceback.format_exc()}")
        status = 1
    # Without the interpreter's farewell: what the parent had open is not the child's to close.
    os._exit(status)
