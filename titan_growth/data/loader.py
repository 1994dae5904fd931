"""Batches: which samples make up which step, on which rank.

The cursor is the number of (base) blocks consumed so far. The global batch at cursor c is the samples that follow c;
data-parallel rank r takes the r-th contiguous chunk and cuts it into microbatches. So the samples of a step do not
depend on the number of ranks, the microbatch size or workers, and resuming is building a loader with the saved cursor.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_growth.data.blocks import BlockDataset
from titan_growth.liveness.stop_signal import STOP_SIGNALS, signal_on_parent_death
from titan_growth.tools.errors import DataError
from titan_growth.tools.labels import IGNORE_INDEX

_NEVER = 2**62  # the cursor is the state; StatefulDataLoader's snapshots are not used


def _microbatches(
    sample: int, size_of: Callable[[int], int], dp_rank: int, dp_degree: int, local_batch_size: int
) -> Iterator[list[int]]:
    """The sample indices of each microbatch of one rank, without end.

    sample: first of the first global batch. size_of: samples of the n-th global batch.
    """
    for number in itertools.count():
        chunk = size_of(number) // dp_degree
        start = sample + dp_rank * chunk
        for first in range(start, start + chunk, local_batch_size):
            yield list(range(first, first + local_batch_size))
        sample += size_of(number)


class BatchLoader:
    """This rank's part of each global batch.

    global_batch_size: samples per step over all ranks; a multiple of dp_degree * local_batch_size.
    size_of: samples of the n-th global batch handed out, from 0, each such a multiple; default: all the same.
    local_batch_size: samples per microbatch.
    cursor: (base) blocks consumed before the first step. If samples cover m > 1 base blocks, a cursor within a sample
        moves up to the next one.
    num_workers, persistent_workers, pin_memory, prefetch_factor: StatefulDataLoader's. pin_memory needs CUDA.

    Raises DataError if the sizes do not divide.
    """

    def __init__(
        self,
        blocks: BlockDataset,
        *,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_degree: int,
        cursor: int,
        size_of: Callable[[int], int] | None = None,
        num_workers: int = 0,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        _check_rank(dp_rank, dp_degree, local_batch_size)
        if cursor < 0:
            raise ValueError(f"cursor {cursor} is negative")
        if global_batch_size < 1 or global_batch_size % (dp_degree * local_batch_size):
            raise DataError(
                f"training.global_batch_size {global_batch_size}: not a positive multiple of data-parallel degree x "
                f"local_batch_size = {dp_degree} x {local_batch_size}. Change one of the three"
            )
        sample = -(-cursor // blocks.blocks_per_sample)
        self._cursor = sample * blocks.blocks_per_sample
        self._blocks_per_sample = blocks.blocks_per_sample
        self._size_of = size_of or (lambda number: global_batch_size)
        self._samples_of_microbatch = dp_degree * local_batch_size
        self._num_batches = 0
        with warnings.catch_warnings():
            # torchdata calls a function that torch has deprecated; nothing the user could change.
            warnings.filterwarnings("ignore", message=".*set_vital")
            self._loader: StatefulDataLoader | None = StatefulDataLoader(
                blocks,
                batch_sampler=_microbatches(sample, self._size_of, dp_rank, dp_degree, local_batch_size),
                num_workers=num_workers,
                collate_fn=stack,
                # These two are accepted only with workers.
                persistent_workers=persistent_workers and num_workers > 0,
                prefetch_factor=prefetch_factor if num_workers > 0 else None,
                pin_memory=pin_memory and torch.cuda.is_available(),
                worker_init_fn=_live_as_long_as_parent,
                # It draws a seed for its workers. From the global generator, that would make the run's random state
                # depend on how often it was resumed.
                generator=torch.Generator(),
                snapshot_every_n_steps=_NEVER,
            )
        self._iterator: Iterator[dict[str, Tensor]] | None = None
        self._workers: list[BaseProcess] = []

    @property
    def cursor(self) -> int:
        """(Base) blocks consumed by all ranks in the global batches handed out so far; saved in checkpoints."""
        return self._cursor

    def next_batch(self) -> list[dict[str, Tensor]]:
        """This rank's microbatches of the next global batch; each tensor is (local_batch_size, seq_len) int64.

        The first call starts the workers; they live as long as the calling thread.
        """
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        if self._iterator is None:
            others = multiprocessing.active_children()
            self._iterator = iter(self._loader)
            self._workers = [one for one in multiprocessing.active_children() if one not in others]
        size = self._size_of(self._num_batches)
        assert size % self._samples_of_microbatch == 0, f"{size} samples do not divide into microbatches of all ranks"
        try:
            microbatches = [next(self._iterator) for _ in range(size // self._samples_of_microbatch)]
        except (ConnectionError, EOFError) as error:  # it died with samples on their way
            raise RuntimeError("DataLoader worker (pid(s) unknown) exited unexpectedly") from error
        self._cursor += size * self._blocks_per_sample
        self._num_batches += 1
        return microbatches

    def close(self) -> None:
        """Stop the workers. The cursor can still be read."""
        self._iterator = None
        self._loader = None
        for worker in self._workers:
            if worker.is_alive():  # stuck in a read. It ignores torch's SIGTERM, and Python's exit would wait for it.
                worker.kill()
        self._workers = []


class ValidationBatches:
    """The same validation sequences at every iteration, dealt to the ranks.

    Takes num_sequences evenly spread `blocks` in stream order (whatever their `shuffle`); all if None or more than
    there are. Every rank yields the same number of batches of the same shape; rows that fill up a batch repeat the
    first block with all labels IGNORE_INDEX.

    Raises DataError if num_sequences is not positive.
    """

    def __init__(
        self, blocks: BlockDataset, num_sequences: int | None, local_batch_size: int, dp_rank: int, dp_degree: int
    ) -> None:
        _check_rank(dp_rank, dp_degree, local_batch_size)
        if num_sequences is not None and num_sequences < 1:
            raise DataError(f"validation: {num_sequences} sequences are too few. Use at least 1")
        self.num_sequences = blocks.num_blocks if num_sequences is None else min(num_sequences, blocks.num_blocks)
        self._blocks = blocks
        self._local_batch_size = local_batch_size
        self._dp_rank = dp_rank
        self._dp_degree = dp_degree

    def __len__(self) -> int:
        """Batches per pass, the same on every rank."""
        return -(-self.num_sequences // (self._dp_degree * self._local_batch_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(len(self)):
            first = (step * self._dp_degree + self._dp_rank) * self._local_batch_size
            yield stack([self._row(number) for number in range(first, first + self._local_batch_size)])

    def _row(self, number: int) -> dict[str, Tensor]:
        if number < self.num_sequences:
            return self._blocks.block(number * self._blocks.num_blocks // self.num_sequences)
        filler = self._blocks.block(0)
        filler["labels"].fill_(IGNORE_INDEX)
        return filler


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of (seq_len,) tensors as one batch of (len(samples), seq_len) tensors."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def sample_digests(microbatches: Sequence[dict[str, Tensor]]) -> list[str]:
    """sha256 (hex) of the inputs and labels of each sample, in order."""
    return [
        hashlib.sha256(inputs.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()
        for batch in microbatches
        for inputs, labels in zip(batch["input"], batch["labels"], strict=True)
    ]


def batch_hash(digests_of_ranks: Sequence[Sequence[str]]) -> str:
    """sha256 (hex) of a global batch, from every rank's `sample_digests` in rank order; equal for all dp degrees."""
    return hashlib.sha256("\n".join(digest for rank in digests_of_ranks for digest in rank).encode()).hexdigest()


def _check_rank(dp_rank: int, dp_degree: int, local_batch_size: int) -> None:
    if not 0 <= dp_rank < dp_degree:
        raise ValueError(f"dp_rank {dp_rank} is not in range({dp_degree})")
    if local_batch_size < 1:
        raise DataError(f"local_batch_size {local_batch_size}: not positive. Use at least 1")


def _live_as_long_as_parent(_worker: int) -> None:
    """Kill this worker with the thread that started it at once (torch's own watchdog takes seconds), and not before.

    Schedulers and terminals signal all processes of a run. The rank still takes the step that it will save.
    """
    signal_on_parent_death(signal.SIGKILL)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
