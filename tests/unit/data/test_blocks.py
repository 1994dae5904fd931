"""Blocks: which tokens a sample has, in which order samples come, and the document mask."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from titan_growth.data.blocks import BlockDataset
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.permutation import Permutation
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import TokenSplit
from titan_growth.data.tokenizers import BytesTokenizer
from titan_growth.tools.errors import DataError
from titan_growth.tools.labels import IGNORE_INDEX

BOS, EOS = 256, 257


def make_split(folder: Path, texts: list[str], shard_tokens: int = 64) -> TokenSplit:
    folder.mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(
        CorpusSpec("json", str(folder)),
        BytesTokenizer(),
        bos=True,
        eos=True,
        validation_fraction=0.0,
        cache_dir=folder.with_name(folder.name + "-cache"),
        shard_tokens=shard_tokens,
    )
    return prepared.train


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    """1,000 tokens in documents of 7 to 31 tokens, in shards of 64."""
    texts, left, number = [], 1000, 0
    while left:
        size = min(left, 7 + number * 11 % 25)
        size = left if left - size < 3 else size
        texts.append("".join(chr(97 + (number + at) % 26) for at in range(size - 2)))
        left, number = left - size, number + 1
    split = make_split(tmp_path / "corpus", texts)
    assert split.num_tokens == 1000
    return split


@pytest.mark.parametrize("size", [1, 2, 3, 5, 255, 256, 257, 1000, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    for epoch in range(3):
        permutation = Permutation(size, seed=1, epoch=epoch)
        assert sorted(permutation(index) for index in range(size)) == list(range(size))


def test_permutation_depends_on_seed_and_epoch_and_looks_random() -> None:
    size = 10_001
    orders = [[Permutation(size, seed, epoch)(index) for index in range(300)] for seed in (0, 1) for epoch in (0, 1)]
    for number, order in enumerate(orders):
        assert sum(a == b for other in orders[:number] for a, b in zip(order, other, strict=True)) < 10
        assert 0.4 < sum(order) / len(order) / size < 0.6
        # Neighbours must not stay neighbours.
        assert sum(abs(a - b) < 50 for a, b in itertools.pairwise(order)) < 15


def test_permutation_of_a_huge_range_needs_no_memory() -> None:
    size = 10**12 + 39
    permutation = Permutation(size, seed=3, epoch=4)
    values = {permutation(index * 10**9) for index in range(1000)}
    assert len(values) == 1000
    assert all(0 <= value < size for value in values)


def test_permutation_is_pinned() -> None:
    """Saved cursors mean something only as long as this does not change."""
    assert [Permutation(1000, seed=0, epoch=0)(index) for index in range(5)] == [763, 560, 175, 881, 629]


@pytest.mark.parametrize("seq_len", [1, 7, 64, 100, 333, 999])
def test_blocks_are_the_stream_in_order(split: TokenSplit, seq_len: int) -> None:
    stream = split.read(0, 1000).tolist()
    blocks = BlockDataset(split, seq_len, document_mask=False, seed=0, shuffle=False)
    assert blocks.num_blocks == len(blocks) == 999 // seq_len
    for index in range(2 * blocks.num_blocks):
        start = index % blocks.num_blocks * seq_len
        sample = blocks[index]
        assert sorted(sample) == ["input", "labels"]
        assert sample["input"].tolist() == stream[start : start + seq_len]
        assert sample["labels"].tolist() == stream[start + 1 : start + seq_len + 1]
        assert str(sample["input"].dtype) == str(sample["labels"].dtype) == "torch.int64"


def test_each_epoch_visits_every_block_once_in_its_own_order(split: TokenSplit) -> None:
    blocks = BlockDataset(split, 10, document_mask=False, seed=5, shuffle=True)
    epochs = [[blocks.block_of(99 * epoch + index) for index in range(99)] for epoch in range(3)]
    assert all(sorted(order) == list(range(99)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = BlockDataset(split, 10, document_mask=False, seed=5, shuffle=True)
    assert [again.block_of(index) for index in reversed(range(99, 198))] == epochs[1][::-1]
    other = BlockDataset(split, 10, document_mask=False, seed=6, shuffle=True)
    assert [other.block_of(index) for index in range(99)] != epochs[0]
    assert blocks[150]["input"].tolist() == split.read(epochs[1][51] * 10, epochs[1][51] * 10 + 10).tolist()


@pytest.mark.parametrize("seq_len", [3, 32, 50, 111])
def test_document_mask(split: TokenSplit, seq_len: int) -> None:
    stream = split.read(0, 1000).tolist()
    plain = BlockDataset(split, seq_len, document_mask=False, seed=0, shuffle=False)
    masked = BlockDataset(split, seq_len, document_mask=True, seed=0, shuffle=False)
    num_ignored = 0
    for number in range(masked.num_blocks):
        sample = masked[number]
        assert sample["input"].equal(plain[number]["input"])
        start, position = number * seq_len, 0
        for at in range(seq_len):
            # In this corpus a document begins exactly where there is a BOS.
            position = 0 if stream[start + at] == BOS or at == 0 else position + 1
            assert sample["positions"][at] == position
            next_token = stream[start + at + 1]
            assert sample["labels"][at] == (IGNORE_INDEX if next_token == BOS else next_token)
            num_ignored += next_token == BOS
    assert num_ignored > 15


def test_longer_samples_cover_consecutive_base_blocks(split: TokenSplit) -> None:
    base = BlockDataset(split, 10, document_mask=False, seed=0, shuffle=False)
    long = BlockDataset(split, 40, document_mask=False, seed=0, shuffle=False, base_seq_len=10)
    assert (base.blocks_per_sample, long.blocks_per_sample, long.num_blocks) == (1, 4, 24)
    for index in range(24):
        parts = [base[4 * index + part]["input"].tolist() for part in range(4)]
        assert long[index]["input"].tolist() == [token for part in parts for token in part]
    with pytest.raises(DataError, match=r"seq_len 45: not a multiple of the run's base length 10"):
        BlockDataset(split, 45, document_mask=False, seed=0, shuffle=False, base_seq_len=10)


def test_too_small_corpus_is_explained_with_numbers(split: TokenSplit, tmp_path: Path) -> None:
    message = (
        r"^the train split has 1,000 tokens, fewer than one block of seq_len \+ 1 = 1,001; "
        r"use a shorter training\.seq_len or a larger corpus$"
    )
    with pytest.raises(DataError, match=message):
        BlockDataset(split, 1000, document_mask=False, seed=0, shuffle=False)
    assert BlockDataset(split, 999, document_mask=False, seed=0, shuffle=False).num_blocks == 1
    with pytest.raises(DataError, match=r"seq_len 0: not positive"):
        BlockDataset(split, 0, document_mask=False, seed=0, shuffle=False)


def test_empty_validation_split_is_explained(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("short")
    prepared = prepare(
        CorpusSpec("text", str(tmp_path / "one.txt")),
        BytesTokenizer(),
        bos=True,
        eos=True,
        validation_fraction=0.1,
        cache_dir=tmp_path / "cache",
    )
    assert prepared.validation is not None
    with pytest.raises(DataError, match=r"the validation split has 0 tokens, fewer than one block"):
        BlockDataset(prepared.validation, 4, document_mask=True, seed=0, shuffle=False)
