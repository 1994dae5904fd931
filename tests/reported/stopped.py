"""Runs that are stopped on their way, as a time limit stops them, and go on at the next call."""

from __future__ import annotations

from tests.runs import trainer_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.liveness.stop_signal import StopSignal


def train_to(rank: int, num_ranks: int, recipe: Recipe, step: int) -> None:
    """Trains this rank from the run's last checkpoint to a step, and saves it."""
    with trainer_of(recipe, num_ranks) as trainer:
        trainer.stop = StopSignal(1, lambda: float(trainer.progress.step + 1 >= step))
        assert trainer.fit() == (step >= recipe.training.steps)
        assert trainer.progress.step == step
