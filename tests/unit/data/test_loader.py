"""The loader: the same global batches for every number of ranks, workers and restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import titan_growth
from titan_growth.data.blocks import BlockDataset
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.loader import BatchLoader, ValidationBatches, batch_hash, sample_digests
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import TokenSplit
from titan_growth.data.tokenizers import BytesTokenizer
from titan_growth.tools.errors import DataError
from titan_growth.tools.labels import IGNORE_INDEX


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "a.txt").write_text("".join(f"line {number}\n" for number in range(1000)))
    (folder / "b.txt").write_text("other text. " * 50)
    return prepare(
        CorpusSpec("text", str(folder)),
        BytesTokenizer(),
        bos=True,
        eos=True,
        validation_fraction=0.0,
        cache_dir=folder / "cache",
        shard_tokens=777,
    ).train


@pytest.fixture
def blocks(split: TokenSplit) -> BlockDataset:
    """147 blocks of 64 tokens."""
    return BlockDataset(split, 64, document_mask=True, seed=1, shuffle=True)


def loader(blocks: BlockDataset, rank: int = 0, degree: int = 1, local: int = 1, **values: Any) -> BatchLoader:
    settings = {"global_batch_size": 16, "cursor": 0, **values}
    return BatchLoader(blocks, local_batch_size=local, dp_rank=rank, dp_degree=degree, **settings)  # type: ignore[arg-type]


def hashes(blocks: BlockDataset, degree: int, local: int, num_batches: int, cursor: int = 0) -> list[str]:
    ranks = [loader(blocks, rank, degree, local, cursor=cursor) for rank in range(degree)]
    return [batch_hash([sample_digests(rank.next_batch()) for rank in ranks]) for _ in range(num_batches)]


def test_a_batch_that_changes_reads_every_sample_once(blocks: BlockDataset) -> None:
    """Sizes 4, 4, 12, 8, ...: the samples of each step follow those of the step before, on any number of ranks."""
    sizes = [4, 4, 12, 8, 8]
    whole = loader(blocks, local=1, global_batch_size=36)
    expected = sample_digests(whole.next_batch())
    for degree, workers in ((1, 0), (2, 1), (4, 0)):
        ranks = [
            loader(blocks, rank, degree, global_batch_size=4, size_of=sizes.__getitem__, num_workers=workers)
            for rank in range(degree)
        ]
        read: list[str] = []
        for number in range(4):
            read += [digest for rank in ranks for digest in sample_digests(rank.next_batch())]
            assert {rank.cursor for rank in ranks} == {sum(sizes[: number + 1])} == {len(read)}
        assert read == expected[:28]
        for rank in ranks:
            rank.close()


def test_global_batches_are_independent_of_ranks_and_microbatches(blocks: BlockDataset) -> None:
    # 12 batches of 16 go beyond the first epoch of 147 blocks.
    expected = hashes(blocks, degree=1, local=16, num_batches=12)
    assert len(set(expected)) == 12
    for degree, local in ((1, 1), (1, 4), (2, 2), (2, 8), (4, 4), (8, 1), (8, 2)):
        assert hashes(blocks, degree, local, num_batches=12) == expected


def test_global_batch_is_the_samples_after_the_cursor(blocks: BlockDataset) -> None:
    ranks = [loader(blocks, rank, degree=2, local=4, cursor=140) for rank in range(2)]
    for step in range(2):
        rows = [row for rank in ranks for batch in rank.next_batch() for row in batch["input"]]
        expected = [blocks[140 + 16 * step + number]["input"] for number in range(16)]
        assert torch.equal(torch.stack(rows), torch.stack(expected))
    assert [rank.cursor for rank in ranks] == [172, 172]


def test_microbatches_have_the_promised_shape(blocks: BlockDataset) -> None:
    microbatches = loader(blocks, rank=1, degree=2, local=2).next_batch()
    assert len(microbatches) == 4
    for batch in microbatches:
        assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
            ("input", "labels", "positions"), (2, 64)
        )


def test_resuming_at_the_cursor_goes_on_exactly(blocks: BlockDataset) -> None:
    whole = hashes(blocks, degree=1, local=4, num_batches=6)
    first = loader(blocks, local=4)
    for _ in range(3):
        first.next_batch()
    assert first.cursor == 48
    assert hashes(blocks, degree=4, local=2, num_batches=3, cursor=first.cursor) == whole[3:]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(blocks: BlockDataset, persistent: bool) -> None:
    alone = loader(blocks, local=4)
    helped = loader(blocks, local=4, num_workers=2, persistent_workers=persistent, prefetch_factor=3, pin_memory=True)
    for _ in range(11):
        expected, got = alone.next_batch(), helped.next_batch()
        for left, right in zip(expected, got, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
    assert alone.cursor == helped.cursor == 176
    helped.close()


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue  # it has just ended
        if int(fields["PPid"]) == pid and "Z" not in fields["State"]:
            found.append(int(fields["Pid"]))
    return found


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def alive(pid: int) -> bool:
    try:
        return "\tZ" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1].splitlines()[0]
    except (OSError, IndexError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("persistent", [False, True])
def test_close_stops_the_workers(blocks: BlockDataset, persistent: bool) -> None:
    before = set(children(os.getpid()))
    helped = loader(blocks, num_workers=2, persistent_workers=persistent)
    helped.next_batch()
    workers = [pid for pid in children(os.getpid()) if pid not in before]
    assert len(workers) >= 2
    helped.close()
    assert helped.cursor == 16
    assert not wait_until_gone(workers, seconds=3)
    with pytest.raises(RuntimeError, match="closed"):
        helped.next_batch()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_close_ends_a_worker_that_is_stuck(blocks: BlockDataset) -> None:
    """PyTorch waits 5 seconds for it, then sends the SIGTERM that workers ignore."""
    before = set(children(os.getpid()))
    helped = loader(blocks, num_workers=1)
    helped.next_batch()
    workers = [pid for pid in children(os.getpid()) if pid not in before]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    helped.close()
    assert not wait_until_gone(workers, seconds=3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 5000)
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from titan_growth.data.blocks import BlockDataset\n"
        "from titan_growth.data.corpus import CorpusSpec\n"
        "from titan_growth.data.loader import BatchLoader\n"
        "from titan_growth.data.preparation import prepare\n"
        "from titan_growth.data.tokenizers import TokenizerSpec\n"
        "corpus = prepare(CorpusSpec('text', sys.argv[1]), TokenizerSpec('bytes'), bos=True, eos=True,\n"
        "    validation_fraction=0.0, cache_dir=Path(sys.argv[2]))\n"
        "blocks = BlockDataset(corpus.train, 32, False, 0, True)\n"
        "loader = BatchLoader(blocks, global_batch_size=4, local_batch_size=2, dp_rank=0, dp_degree=1, cursor=0,\n"
        "    num_workers=2)\n"
        "loader.next_batch()\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.txt"), str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(titan_growth.__file__).parents[1])},
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        workers = children(process.pid)
        assert len(workers) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    # The library's own watchdog would need 5 seconds.
    assert not wait_until_gone(workers, seconds=2)


def test_cursor_counts_base_blocks(split: TokenSplit) -> None:
    long = BlockDataset(split, 128, document_mask=False, seed=1, shuffle=True, base_seq_len=64)
    half = loader(long, local=4, cursor=32)
    assert half.cursor == 32
    rows = torch.cat([batch["input"] for batch in half.next_batch()])
    assert torch.equal(rows[0], long[16]["input"])
    assert half.cursor == 64
    assert loader(long, local=4, cursor=33).cursor == 34
    assert torch.equal(loader(long, local=4, cursor=33).next_batch()[0]["input"][0], long[17]["input"])


def test_sizes_that_do_not_divide_are_refused(blocks: BlockDataset) -> None:
    with pytest.raises(DataError, match=r"global_batch_size 16: not a positive multiple of .* = 2 x 3"):
        loader(blocks, degree=2, local=3)
    with pytest.raises(DataError, match=r"global_batch_size 0: not a positive multiple"):
        loader(blocks, global_batch_size=0)
    with pytest.raises(DataError, match=r"local_batch_size 0: not positive"):
        loader(blocks, local=0)


def test_digests_see_every_token_label_and_the_order(blocks: BlockDataset) -> None:
    batches = loader(blocks, local=4).next_batch()
    before = sample_digests(batches)
    assert len(set(before)) == 16
    assert batch_hash([before]) == batch_hash([before[:3], before[3:]]) != batch_hash([before[3:], before[:3]])
    for key in ("input", "labels"):
        batches[1][key][2, 63] += 1
        after = sample_digests(batches)
        assert [number for number in range(16) if after[number] != before[number]] == [6]
        batches[1][key][2, 63] -= 1
    assert sample_digests(batches) == before


@pytest.mark.parametrize("num_sequences", [1, 5, 16, 17, 146, None, 10_000])
def test_validation_is_the_same_set_for_every_degree(blocks: BlockDataset, num_sequences: int | None) -> None:
    def rows_of(degree: int, local: int) -> list[bytes]:
        ranks = [ValidationBatches(blocks, num_sequences, local, rank, degree) for rank in range(degree)]
        passes = [list(rank) for rank in ranks]
        assert {len(batches) for batches in passes} == {len(ranks[0])}
        assert {tuple(batch["input"].shape) for batches in passes for batch in batches} == {(local, 64)}
        rows = [
            pair
            for batches in passes
            for batch in batches
            for pair in zip(batch["input"], batch["labels"], strict=True)
        ]
        real = [torch.cat(row).numpy().tobytes() for row in rows if (row[1] != IGNORE_INDEX).any()]
        assert all((row[0] >= 0).all() and (row[0] < 258).all() for row in rows)
        return sorted(real)

    expected = rows_of(1, 1)
    wanted = min(num_sequences or blocks.num_blocks, blocks.num_blocks)
    assert len(expected) == wanted
    if wanted == blocks.num_blocks:
        every = [blocks.block(number) for number in range(wanted)]
        assert expected == sorted(torch.cat([row["input"], row["labels"]]).numpy().tobytes() for row in every)
    for degree, local in ((1, 4), (2, 3), (4, 1), (8, 2)):
        assert rows_of(degree, local) == expected


def test_validation_repeats_itself_and_refuses_nothing_to_do(blocks: BlockDataset) -> None:
    batches = ValidationBatches(blocks, 10, 4, 0, 1)
    first, second = list(batches), list(batches)
    assert len(first) == len(second) == 3
    assert all(torch.equal(a["input"], b["input"]) for a, b in zip(first, second, strict=True))
    with pytest.raises(DataError, match=r"validation: 0 sequences are too few"):
        ValidationBatches(blocks, 0, 4, 0, 1)
