"""A small prepared corpus whose blocks can be told apart, for reports about the order of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_growth.data.blocks import BlockDataset
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.loader import BatchLoader
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import TokenSplit
from titan_growth.data.tokenizers import BytesTokenizer

NUM_BLOCKS = 21
"""Blocks in an epoch: no batch size in these tests divides it."""
SEQ_LEN = 16


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """One document a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def split_of(folder: Path, *, bos: bool = True, eos: bool = True) -> TokenSplit:
    """The training split of a folder of texts, one token a byte."""
    corpus = prepare(
        CorpusSpec("json", str(folder)),
        BytesTokenizer(),
        bos=bos,
        eos=eos,
        validation_fraction=0.0,
        cache_dir=folder.with_name("cache"),
    )
    return corpus.train


class Epochs:
    """Numbered blocks, and which of them a loader hands out."""

    def __init__(self, folder: Path) -> None:
        text = "".join(f"{number:05d} " for number in range(100))[: NUM_BLOCKS * SEQ_LEN]
        write_jsonl(folder / "corpus" / "a.jsonl", [text[:100], text[100:]])
        self.split = split_of(folder / "corpus")
        known = self.blocks()
        assert known.num_blocks == NUM_BLOCKS
        self._number_of = {bytes(known.block(one)["input"].numpy()): one for one in range(NUM_BLOCKS)}
        assert len(self._number_of) == NUM_BLOCKS

    def blocks(self, *, shuffle: bool = True) -> BlockDataset:
        """As after a start of the program: nothing of an earlier epoch is remembered."""
        return BlockDataset(self.split, SEQ_LEN, document_mask=False, seed=3, shuffle=shuffle)

    def loader(self, cursor: int = 0, *, batch: int = 8, rank: int = 0, degree: int = 1, **more: Any) -> BatchLoader:
        """One rank's batches from a cursor on."""
        shuffle = more.pop("shuffle", True)
        return BatchLoader(
            self.blocks(shuffle=shuffle),
            global_batch_size=batch,
            local_batch_size=1,
            dp_rank=rank,
            dp_degree=degree,
            cursor=cursor,
            **more,
        )

    def numbers(self, loader: BatchLoader, num_batches: int) -> list[int]:
        """The blocks of a rank's next batches."""
        microbatches = [microbatch for _ in range(num_batches) for microbatch in loader.next_batch()]
        return [self._number_of[bytes(row.numpy())] for microbatch in microbatches for row in microbatch["input"]]

    def read(self, cursor: int, num_batches: int, **settings: Any) -> list[int]:
        """The blocks that a run sees which goes on at a cursor."""
        loader = self.loader(cursor, **settings)
        try:
            return self.numbers(loader, num_batches)
        finally:
            loader.close()

    def order(self, num_samples: int) -> list[int]:
        """The blocks of a run that was never stopped."""
        blocks = self.blocks()
        return [blocks.block_of(sample) for sample in range(num_samples)]
