"""Reports about checkpoints that are read on another mesh than they were written on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import WarmRanks
from tests.hugging_face import stored
from tests.reported.stopped import train_to
from tests.runs import make_recipe, read_metrics, relative_difference, train

slow = pytest.mark.slow
ODD: dict[str, Any] = {
    "model__dim": 36,
    "model__n_heads": 6,
    "model__hidden_dim": 91,
    "model__n_layers": 2,
    "training__global_batch_size": 24,
    "training__local_batch_size": 1,
    "training__steps": 6,
    "checkpoint__enable": True,
    "checkpoint__interval": 100,
}
"""No number of ranks divides the rows of its SwiGLU weights."""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    warm_ranks(train, 1, 1, make_recipe(folder, **{**ODD, "training__local_batch_size": 24}))
    return folder


@pytest.mark.parametrize("path", [(2, 1), pytest.param((8, 1, 3), marks=slow)], ids=str)
def test_megatron_2769_swiglu_weights_on_another_number_of_ranks(
    path: tuple[int, ...], one_rank: Path, tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    for number, num_ranks in enumerate(path, 1):
        recipe = make_recipe(tmp_path / "run", **ODD)
        warm_ranks(train_to, num_ranks, num_ranks, recipe, 6 * number // len(path), timeout_seconds=200)
    found, expected = read_metrics(tmp_path / "run"), read_metrics(one_rank)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert max(relative_difference(*pair, "loss") for pair in zip(found, expected, strict=True)) < 1e-5


@slow
def test_megatron_5265_moments_of_odd_shards(one_rank: Path, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    recipe = make_recipe(tmp_path / "run", **ODD)
    warm_ranks(train, 3, 3, recipe)
    found, expected = (stored(folder / "checkpoint" / "step-6") for folder in (tmp_path / "run", one_rank))
    moments = [name for name in expected if name.endswith("exp_avg") and "feed_forward" in name]
    assert len(moments) == 6
    for name in moments:
        assert 91 in expected[name].shape
        assert found[name].shape == expected[name].shape
        difference = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert difference < 1e-3, name
