"""A time limit ends a run like a signal: all ranks after the same step, and saved, also around a growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.runs import make_recipe, read_metrics, train, trainer_of, without_timings
from titan_growth.liveness.stop_signal import StopSignal

SETTINGS: dict[str, Any] = {
    "training__steps": 6,
    "checkpoint__enable": True,
    "checkpoint__interval": 100,
    "job__time_limit_seconds": 60,
}
LEARNED = {
    "growth__stages": '[{at = "3 steps", operator = "learn", factor = 2, options = {steps = 3}}]',
    "training__global_batch_size": 4,
}


def train_until(rank: int, num_ranks: int, recipe: Any, batches: int) -> tuple[int, str]:
    """Time is up on rank 1 alone, after a number of batches; (last step, this rank's reason)."""
    with trainer_of(recipe, num_ranks) as trainer:
        taken = 0
        original = type(trainer).agree

        def counted(self: Any, runtime: Any, batch: Any) -> Any:
            nonlocal taken
            taken += 1
            return original(self, runtime, batch)

        type(trainer).agree = counted
        limit = recipe.job.time_limit_seconds
        trainer.stop = StopSignal(limit, lambda: limit if rank == 1 and taken >= batches else 0.0)
        assert not trainer.fit()
        return trainer.progress.step, trainer.stop.reason


@pytest.mark.parametrize(
    ("batches", "step", "more"),
    [
        pytest.param(2, 2, {}, marks=pytest.mark.slow),
        pytest.param(3, 3, LEARNED, marks=pytest.mark.slow),  # the step before the growth
        (5, 3, LEARNED),  # the second batch of the learning phase: back to the small model
    ],
)
def test_one_rank_whose_time_is_up_stops_all(batches: int, step: int, more: dict[str, Any], tmp_path: Path) -> None:
    """And the same command resumes to the numbers of an unbroken run."""
    settings = {**SETTINGS, **more}
    broken = make_recipe(tmp_path / "broken", **settings)
    ends = run_ranks(train_until, 2, 2, broken, batches)
    assert ends == [(step, ""), (step, " (job.time_limit_seconds = 60 is over)")]
    assert (tmp_path / "broken" / "checkpoint" / f"step-{step}" / "manifest.json").exists()
    run_ranks(train, 2, 2, broken)
    run_ranks(train, 2, 2, make_recipe(tmp_path / "whole", **settings))
    assert without_timings(read_metrics(tmp_path / "broken")) == without_timings(read_metrics(tmp_path / "whole"))
