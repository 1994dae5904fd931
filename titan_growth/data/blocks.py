"""Blocks: a prepared split as an endless sequence of fixed-length samples with random access.

Packing: the token stream of a split is cut into blocks of seq_len inputs without regard to documents. Block b reads
seq_len + 1 tokens from b * seq_len on: labels are the inputs shifted by one. Less than a block is lost at the end.

Sample i belongs to epoch i // num_blocks. An epoch visits every block once, in an order fixed by seed and epoch. So
sample i is the same on every rank, for every batch size, and after every restart.

Longer sequences later in training: base_seq_len is the run's shortest, a sample of seq_len = m * base_seq_len covers m
consecutive base blocks, and the cursor counts base blocks (`blocks_per_sample` is m). Long samples are shuffled whole:
joining distant blocks would defeat their purpose. If the length changes within an epoch, the rest of it follows another
order, so some text is seen twice and some not at all; the next epoch visits everything once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from titan_growth.data.permutation import Permutation
from titan_growth.data.prepared import TokenSplit
from titan_growth.tools.errors import DataError
from titan_growth.tools.labels import IGNORE_INDEX


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Random access to the samples of a split.

    document_mask: add "positions", which restart at each document, and ignore labels that another document predicts.
    seed, shuffle: the order of the blocks within each epoch; without shuffle, stream order.
    base_seq_len: see the module; None means seq_len.

    Raises DataError if the split is shorter than one block or seq_len is not a multiple of base_seq_len.
    """

    def __init__(
        self,
        split: TokenSplit,
        seq_len: int,
        document_mask: bool,
        seed: int,
        shuffle: bool,
        base_seq_len: int | None = None,
    ) -> None:
        base_seq_len = seq_len if base_seq_len is None else base_seq_len
        if seq_len < 1 or base_seq_len < 1:
            raise DataError(f"training.seq_len {min(seq_len, base_seq_len)}: not positive. Use at least 1")
        if seq_len % base_seq_len:
            raise DataError(
                f"seq_len {seq_len:,}: not a multiple of the run's base length {base_seq_len:,}. "
                "Let every sequence length of the run be a multiple of the shortest"
            )
        self.split = split
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.seed = seed
        self.shuffle = shuffle
        self.blocks_per_sample = seq_len // base_seq_len
        self.num_blocks = max(split.num_tokens - 1, 0) // seq_len
        if self.num_blocks == 0:
            raise DataError(
                f"the {split.name} split has {split.num_tokens:,} tokens, fewer than one block of "
                f"seq_len + 1 = {seq_len + 1:,}; use a shorter training.seq_len or a larger corpus"
            )
        self._permutation: tuple[int, Permutation] | None = None

    def __len__(self) -> int:
        """Samples in one epoch; larger indices belong to later epochs."""
        return self.num_blocks

    def block_of(self, index: int) -> int:
        """The block of sample `index`, which has no upper bound."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0")
        epoch, position = divmod(index, self.num_blocks)
        if not self.shuffle:
            return position
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self.num_blocks, self.seed, epoch))
        return self._permutation[1](position)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: "input" and "labels", and with document_mask "positions", each (seq_len,) int64."""
        return self.block(self.block_of(index))

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """Block `number` (0 <= number < num_blocks) in stream order; same contents as a sample."""
        if not 0 <= number < self.num_blocks:
            raise IndexError(f"block {number} of {self.num_blocks}")
        start = number * self.seq_len
        tokens = self.split.read(start, start + self.seq_len + 1)
        sample = {"input": torch.from_numpy(tokens[:-1].copy()), "labels": torch.from_numpy(tokens[1:].copy())}
        if self.document_mask:
            # Relative to the block. A block that begins within a document also starts at position 0.
            starts = self.split.document_starts(start + 1, start + self.seq_len + 1) - start
            sample["labels"][torch.from_numpy(starts - 1)] = IGNORE_INDEX
            origins = np.zeros(self.seq_len, dtype=np.int64)
            inside = starts[starts < self.seq_len]
            origins[inside] = inside
            positions = np.arange(self.seq_len, dtype=np.int64) - np.maximum.accumulate(origins)
            sample["positions"] = torch.from_numpy(positions)
        return sample
