"""QK-clip's factors, and what it refuses. What it does to a run: tests/distributed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.runs import BASE, argv_of
from titan_growth.config.loader import load_recipe
from titan_growth.run.plan import plan_run, stage_lines
from titan_growth.stages.qk_clip import Factors
from titan_growth.tools.findings import Findings


def test_without_groups_both_take_the_root() -> None:
    queries, keys = Factors.of(torch.tensor([50.0, 200.0, 400.0]), 100.0, 3)
    assert queries.tolist() == keys.tolist() == pytest.approx([1.0, 0.5**0.5, 0.5])


def test_in_a_group_every_head_is_scaled_by_its_own_factor() -> None:
    """The key by the root of the smallest; logits of heads below the threshold stay."""
    largest = torch.tensor([50.0, 400.0, 160.0, 90.0, 90.0, 90.0])
    queries, keys = Factors.of(largest, 100.0, 2)
    assert keys.tolist() == [0.5, 1.0]
    scaled = largest * queries * keys.repeat_interleave(3)
    assert scaled.tolist() == pytest.approx([50.0, 100.0, 100.0, 90.0, 90.0, 90.0])
    assert queries.tolist() == pytest.approx([2.0, 0.5, 1.25, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf, -500.0])
def test_what_is_not_above_the_threshold_is_left_alone(strange: float) -> None:
    """Weights are not multiplied by 0 or NaN: a step that is not finite is for `[stability]` to judge."""
    queries, keys = Factors.of(torch.tensor([strange, 99.0]), 100.0, 1)
    assert (queries.tolist(), keys.tolist()) == ([1.0, 1.0], [1.0])


def planned(**values: Any) -> tuple[list[str], Findings]:
    settings = {**BASE, "optimizer.qk_clip": 100.0, **{key.replace("__", "."): value for key, value in values.items()}}
    plan = plan_run(load_recipe(argv_of(settings)), found := Findings(), num_ranks=1, device_type="cpu")
    return (stage_lines(plan.phase, "cpu") if plan else []), found


def test_its_line_in_the_plan() -> None:
    assert "  qk_clip: after each step, heads with logits above 100" in planned()[0]
    lines, _ = planned(optimizer__qk_clip_interval=10, optimizer__qk_clip=30.5)
    assert "  qk_clip: after every 10 steps, heads with logits above 30.5" in lines
    assert not any("qk_clip" in line for line in planned(optimizer__qk_clip=0.0)[0])


def test_it_is_said_when_no_step_is_looked_at() -> None:
    _, found = planned(optimizer__qk_clip_interval=7)
    assert [str(problem) for problem in found.warnings] == [
        "optimizer.qk_clip_interval: 7 is more than training.steps 6: nothing is clipped"
    ]


def test_frozen_projections_are_not_scaled() -> None:
    _, found = planned(optimizer__groups='[{pattern = "layers.0.*", frozen = true}]')
    assert [str(problem) for problem in found.problems] == [
        "optimizer.qk_clip: would scale layers.0.attention.wq.weight, which the group 'layers.0.*' freezes. Set it to "
        "0, or leave wq and wk out of the group"
    ]
    _, found = planned(optimizer__groups='[{pattern = "*.wv.weight", frozen = true}]')
    assert found.problems == []
