"""Reports about learning rates and hyper-parameters: edges of a schedule, and what a resume makes of them."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness import WarmRanks
from tests.reported.stopped import train_to
from tests.runs import make_recipe, read_metrics, train, without_timings
from titan_growth.config.schema.growth import GrowthConfig
from titan_growth.config.schema.recipe import LRSchedulerConfig, OptimizerConfig
from titan_growth.engine.optimizer import Optimizer
from titan_growth.run.lr_schedule import LRSchedule

PEAK = 1e-3


def rates(steps: int, **section: Any) -> list[float]:
    """The learning rate of each step of a run, as shares of the peak."""
    schedule = LRSchedule(LRSchedulerConfig(**section), lr=PEAK, steps=steps, growth=GrowthConfig())
    return [schedule(step) / PEAK for step in range(1, steps + 1)]


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 10])
def test_torchtitan_1010_no_decay_at_all(decay_type: str, warmup_steps: int) -> None:
    found = rates(10, warmup_steps=warmup_steps, decay_ratio=0.0, decay_type=decay_type)
    assert found[warmup_steps:] == [1.0] * (10 - warmup_steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("decay_ratio", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 200])
def test_torchtitan_1261_every_step_learns_and_the_peak_is_reached(
    steps: int, decay_ratio: float | None, warmup_steps: int
) -> None:
    found = rates(steps, warmup_steps=warmup_steps, decay_ratio=decay_ratio)
    assert max(found) == 1.0
    assert min(found) > 0.0, "a step without learning"
    rise = min(warmup_steps, steps)
    assert found[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
def test_composer_1077_warmup_as_long_as_the_run(decay_type: str) -> None:
    found = rates(100, warmup_steps=100, decay_type=decay_type)
    assert found == pytest.approx([step / 100 for step in range(1, 101)])


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_deepspeed_771_warmup_of_no_step_and_of_one(warmup_steps: int) -> None:
    found = rates(10, warmup_steps=warmup_steps)
    assert found[0] == 1.0
    assert all(math.isfinite(rate) and later <= rate for rate, later in pairwise(found))


@pytest.mark.parametrize("decay_ratio", [None, 0.2])
def test_torchtitan_2326_a_short_run_with_the_schedule_of_a_long_one(decay_ratio: float | None) -> None:
    settings: dict[str, Any] = {"warmup_steps": 2, "decay_ratio": decay_ratio}
    assert rates(50, total_steps=1000, **settings) == rates(1000, **settings)[:50]


def test_automodel_3882_weight_decay_of_the_recipe_in_the_first_step_after_a_resume() -> None:
    def trained(weight_decay: float) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 3, bias=False)
        return model, Optimizer([model], OptimizerConfig(weight_decay=weight_decay), max_norm=1.0)

    def step(model: nn.Module, optimizer: Optimizer) -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0.1)
        return next(model.parameters()).detach().clone()

    saved_model, saved = trained(0.1)
    weights = step(saved_model, saved)
    assert {key for _, key, _ in saved.named_state()} == {"exp_avg", "exp_avg_sq", "step"}, "no hyper-parameter"
    after = []
    for weight_decay in (0.1, 0.5):
        model, optimizer = trained(weight_decay)
        for (_, _, mine), (_, _, stored) in zip(optimizer.named_state(), saved.named_state(), strict=True):
            mine.copy_(stored)
        next(model.parameters()).data.copy_(weights)
        after.append(step(model, optimizer))
    torch.testing.assert_close(after[0] - after[1], 0.1 * (0.5 - 0.1) * weights)


GROWING: dict[str, Any] = {
    "model__dim": 16,
    "model__n_layers": 2,
    "training__steps": 8,
    "training__global_batch_size": 2,
    "checkpoint__enable": True,
    "checkpoint__interval": 100,
    "lr_scheduler__warmup_steps": 2,
}
POLICIES = ["restart", "continue", "rewarm", "rewarm_new"]


@pytest.mark.parametrize(
    "policy", ["restart", *(pytest.param(policy, marks=pytest.mark.slow) for policy in POLICIES[1:])]
)
def test_automodel_763_learning_rate_over_resumes(policy: str, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    growth = {"growth__stages": f'[{{at = "4 steps", factor = 2, lr_policy = "{policy}"}}]'}
    fixed = {**GROWING, **growth, "lr_scheduler__total_steps": 8}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **fixed))
    for steps in (2, 6, 8):  # before the growth and after it
        warm_ranks(train_to, 1, 1, make_recipe(tmp_path / "parts", **fixed), steps)
    whole, parts = (without_timings(read_metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert parts == whole
    found = [line["lr"] for line in whole if "lr" in line]
    assert len(found) == 8
    assert len(set(found)) > 2
