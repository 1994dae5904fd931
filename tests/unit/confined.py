"""Calling functions in a child process that may not have much memory or time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

MAX_MEMORY = 256 << 20
"""Bytes that a child may take beyond what it has from its parent."""
MAX_SECONDS = 20
"""For all ways of reading one, on a busy machine; alone it takes a tenth of a second."""


class Confined:
    """A child process with little memory, which calls functions one after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_confined, args=(theirs, os.getpid()))
        self._child.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *args: Any, max_seconds: float = MAX_SECONDS) -> Any:
        """The (picklable) result of a function.

        Raises:
            AssertionError: when it raised, took too much memory or too long, or the child died.
        """
        self._pipe.send_bytes(pickle.dumps((function, args)))
        assert self._pipe.poll(max_seconds), f"not done after {max_seconds} s"
        succeeded, result, peak = self._pipe.recv()
        assert succeeded, result
        assert peak < MAX_MEMORY, f"took {peak >> 20} MiB"
        return result

    def close(self) -> None:
        self._child.kill()
        self._child.join()


def _confined(pipe: Any, parent: int) -> None:
    """The life of the child."""

    def in_use(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) << 10

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    limit = in_use("VmSize") + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while os.getppid() == parent:
        if not pipe.poll(1):
            continue
        function, args = pickle.loads(pipe.recv_bytes())
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, at what is in use
        before = in_use("VmRSS")
        try:
            pipe.send((True, function(*args), in_use("VmHWM") - before))
        except BaseException:
            pipe.send((False, traceback.format_exc()[-3000:], 0))
    os._exit(0)
