"""Reports about where the data goes on: after a resume, over the end of an epoch, on other ranks, with workers."""

from __future__ import annotations

import pytest

from tests.reported.corpora import NUM_BLOCKS, Epochs
from titan_growth.data.loader import ValidationBatches
from titan_growth.tools.labels import IGNORE_INDEX

EVERY_BLOCK = list(range(NUM_BLOCKS))


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory) -> Epochs:
    return Epochs(tmp_path_factory.mktemp("epochs"))


def test_olmo_650_start_index_after_a_resume(epochs: Epochs) -> None:
    resumed = epochs.read(16, 7)  # within the first epoch, and on into the fourth
    assert resumed == epochs.order(72)[16:]
    second, third = resumed[NUM_BLOCKS - 16 :][:NUM_BLOCKS], resumed[2 * NUM_BLOCKS - 16 :][:NUM_BLOCKS]
    assert sorted(second) == sorted(third) == EVERY_BLOCK


def test_litgpt_1712_epochs_after_a_resume_near_the_end_of_one(epochs: Epochs) -> None:
    resumed = epochs.read(19, 12, batch=4)
    assert sorted(resumed[2:][:NUM_BLOCKS]) == sorted(resumed[2 + NUM_BLOCKS :][:NUM_BLOCKS]) == EVERY_BLOCK


def test_torchtitan_1357_saved_at_the_end_of_an_epoch(epochs: Epochs) -> None:
    whole = epochs.order(3 * NUM_BLOCKS)
    at_the_end = epochs.read(NUM_BLOCKS, 3, batch=7)
    assert at_the_end == whole[NUM_BLOCKS : 2 * NUM_BLOCKS]
    assert at_the_end != whole[:NUM_BLOCKS], "the first epoch is read again"
    assert epochs.read(NUM_BLOCKS + 3, 2, batch=7) == whole[NUM_BLOCKS + 3 : NUM_BLOCKS + 17]


@pytest.mark.parametrize("num_epochs", [1, 2, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_nemo_speech_7221_resumed_when_the_data_is_used_up(num_epochs: int, shuffle: bool, epochs: Epochs) -> None:
    seen = epochs.read(num_epochs * NUM_BLOCKS, NUM_BLOCKS // 7, batch=7, shuffle=shuffle)
    assert sorted(seen) == EVERY_BLOCK


def test_accelerate_4071_order_within_a_later_epoch(epochs: Epochs) -> None:
    second = epochs.order(2 * NUM_BLOCKS)[NUM_BLOCKS:]
    assert second != epochs.order(NUM_BLOCKS)
    assert epochs.read(NUM_BLOCKS + 9, 3, batch=4) == second[9:]


def test_datasets_7447_workers_that_persist_over_epochs(epochs: Epochs) -> None:
    resumed = epochs.read(16, 6, num_workers=2, persistent_workers=True)
    assert resumed == epochs.order(64)[16:]
    assert sorted(resumed[NUM_BLOCKS - 16 :][:NUM_BLOCKS]) == EVERY_BLOCK


def test_datasets_8295_resumed_twice(epochs: Epochs) -> None:
    cursor, seen = 0, []
    for _ in range(4):
        loader = epochs.loader(cursor)
        seen += epochs.numbers(loader, 2)
        assert loader.cursor > cursor
        cursor = loader.cursor
    assert seen == epochs.order(64)


def test_datasets_3423_workers_do_not_repeat_samples(epochs: Epochs) -> None:
    seen = epochs.read(0, 3, batch=7, num_workers=2)
    assert sorted(seen) == EVERY_BLOCK
    assert seen == epochs.order(NUM_BLOCKS)


def test_olmo_182_resumed_with_another_batch_size(epochs: Epochs) -> None:
    assert epochs.read(24, 3, batch=12) == epochs.order(60)[24:]
    assert epochs.read(24, 6, batch=5) == epochs.order(54)[24:]


def test_torchtitan_811_resumed_on_more_ranks_and_on_fewer(epochs: Epochs) -> None:
    whole, seen = epochs.order(64), []
    for cursor, degree in ((0, 8), (16, 16), (32, 4), (48, 1)):
        for rank in range(degree):
            seen += epochs.read(cursor, 1, batch=16, rank=rank, degree=degree)
    assert seen == whole


def test_prime_rl_1035_ranks_that_load_ahead_agree_on_the_position(epochs: Epochs) -> None:
    ranks = [epochs.loader(rank=rank, degree=2, num_workers=1, prefetch_factor=2 + 4 * rank) for rank in range(2)]
    for rank in ranks:
        epochs.numbers(rank, 2)
    assert [rank.cursor for rank in ranks] == [16, 16], "a worker's lead is taken for the position"
    for rank in ranks:
        rank.close()
    resumed = [epochs.read(16, 1, rank=rank, degree=2) for rank in range(2)]
    assert resumed[0] + resumed[1] == epochs.order(24)[16:]


def test_pytorch_141069_no_rank_runs_out_of_data(epochs: Epochs) -> None:
    degree = 4
    assert NUM_BLOCKS % degree
    per_rank = [epochs.read(0, 20, batch=degree, rank=rank, degree=degree) for rank in range(degree)]
    assert [len(seen) for seen in per_rank] == [20] * degree
    dealt = [seen for step in zip(*per_rank, strict=True) for seen in step]
    assert dealt == epochs.order(20 * degree)


@pytest.mark.parametrize("num_sequences", [1, 3, NUM_BLOCKS])
def test_torchtitan_1618_validation_on_more_ranks_than_sequences(num_sequences: int, epochs: Epochs) -> None:
    degree = 8
    ranks = [ValidationBatches(epochs.blocks(), num_sequences, 1, rank, degree) for rank in range(degree)]
    passes = [list(rank) for rank in ranks]
    assert {len(batches) for batches in passes} == {-(-num_sequences // degree)}
    labels = [batch["labels"] for batches in passes for batch in batches]
    counted = [row for row in labels if (row != IGNORE_INDEX).any()]
    assert len(counted) == num_sequences
    assert len({bytes(row.numpy()) for row in counted}) == num_sequences


def test_megatron_bridge_5987_validation_does_not_move_on(epochs: Epochs) -> None:
    first = [batch["input"].tolist() for batch in ValidationBatches(epochs.blocks(), 5, 2, 0, 1)]
    validation = ValidationBatches(epochs.blocks(), 5, 2, 0, 1)  # as after a resume
    for _ in range(3):
        assert [batch["input"].tolist() for batch in validation] == first
