"""Helpers around `torch.distributed`: starting it, agreeing on results, failing together.

A check that only one rank makes (a disk, a folder) must have the same outcome on all, or the others block in a
collective until it times out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.tools.errors import ConfigError, TitanGrowthError
from titan_growth.tools.torch_private import FakeStore, process_groups, set_group_timeout

Result = TypeVar("Result")

DEVICE_MARGIN_SECONDS = 60
"""How much longer NCCL's time limit is: its watchdog aborts the process, heartbeat.py first names the rank."""

_timeout_seconds = float("inf")


def timeout_in_force() -> float:
    """The current time limit of collectives, in seconds."""
    return _timeout_seconds


def init_process_group(device_type: str, timeout_seconds: int, *, fake: bool = False) -> None:
    """Starts the default process group from torchrun's environment, or for a single rank without one.

    On CUDA, NCCL carries device tensors, and gloo host tensors and objects.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_seconds)
    _remember_timeout(timeout_seconds)
    if fake:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
        return
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if num_ranks == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, num_ranks = next(dist.rendezvous("env://", rank, num_ranks, timeout=timeout))
        store.set_timeout(timeout)
        # Torchrun keeps its store when it restarts failed ranks: without a prefix they would find the addresses of
        # dead ones.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        if device_type == "cuda":
            set_timeout(timeout_seconds)


_SAVING = "checkpoint"
_SAVING_TIMEOUT_SECONDS = 3600
"""On a slow or busy file system, ranks finish writing far apart."""


def saving_group() -> dist.ProcessGroup | None:
    """The group of all ranks for saves, made once; None for a single rank. All ranks must call it at the same point.

    It carries host objects only, and is separate from the training's groups: a save in the background must not mix its
    messages with those of the steps.
    """
    if dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return None
    for group in process_groups():
        if group.group_desc == _SAVING:
            return group
    timeout = timedelta(seconds=_SAVING_TIMEOUT_SECONDS)
    return dist.new_group(backend="gloo", timeout=timeout, group_desc=_SAVING)


def set_timeout(timeout_seconds: int) -> None:
    """Changes the time limit of all process groups except the one for saves."""
    _remember_timeout(timeout_seconds)
    for group in process_groups():
        if dist.get_backend(group) != "fake" and group.group_desc != _SAVING:
            set_group_timeout(group, timeout_seconds, timeout_seconds + DEVICE_MARGIN_SECONDS)


def _remember_timeout(timeout_seconds: int) -> None:
    global _timeout_seconds
    _timeout_seconds = timeout_seconds


def place() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) without a process group, as in the preflight."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank0(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on rank 0 and returns its (picklable) result on every rank.

    Args:
        group: of all ranks; default: that of the training.

    Raises:
        TitanGrowthError: on every rank, when rank 0 raised one, or an OSError.
    """
    outcome: list[Any] = [None, None]
    rank, num_ranks = place()
    if rank == 0:
        try:
            outcome[0] = work()
        except (TitanGrowthError, OSError) as error:
            outcome[1] = error
    if num_ranks > 1:
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"), group=group)
    if isinstance(outcome[1], OSError):
        raise TitanGrowthError(describe_os_error(outcome[1]))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's (picklable) value, in rank order, on every rank."""
    num_ranks = place()[1] if group is None else dist.get_world_size(group)
    if num_ranks == 1:
        return [value]
    values: list[Any] = [None] * num_ranks
    dist.all_gather_object(values, value, group=group)
    return values


def reduce_maxima(values: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """The largest of each value over the ranks, in place. A NaN, which backends may drop, becomes infinite first."""
    values.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)


def fail_together(errors: Sequence[str], kind: type[TitanGrowthError], group: dist.ProcessGroup | None = None) -> None:
    """Raises `kind` on every rank, with the first error, when any rank passes errors."""
    for rank, found in enumerate(gather_objects(list(errors), group)):
        if found:
            raise kind(found[0] if rank == place()[0] == 0 else f"rank {rank}: {found[0]}")


def require_agreement(facts: Mapping[str, str]) -> None:
    """Raises ConfigError on every rank, naming the first difference, unless all have the same recipe, corpus, ...

    Machines may have local files.
    """
    ranks = gather_objects(dict(facts))
    for rank, found in enumerate(ranks):
        for name, value in ranks[0].items():
            if found.get(name) != value:
                message = f"rank {rank} has a different {name} from rank 0 ({found.get(name)} instead of {value})"
                raise ConfigError(f"{message}. Give every machine the same files, versions and arguments")


def describe_os_error(error: OSError) -> str:
    """`No space left on device: /path`, without Python's errno prefix."""
    path = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{path}"
