"""A batch schedule: the size of every step, the learning rate by tokens, the plan, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import make_recipe
from titan_growth.checkpoint.history import Progress
from titan_growth.commands.plan_report import report_lines
from titan_growth.config.batch_sizes import STEPS, BatchSizes
from titan_growth.config.schema.growth import GrowthConfig
from titan_growth.config.schema.recipe import LRSchedulerConfig, TrainingConfig
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.plan import ResumePoint, RunPlan, plan_run
from titan_growth.tools.findings import Findings

FOUR_FOLD = {"training__batch_schedule__0__at": "1024 tokens", "training__batch_schedule__0__global_batch_size": 32}
"""8 x 32 tokens a step for 4 steps, then 32 x 32."""


def sizes(*entries: tuple[str, int], first: int = 8) -> BatchSizes:
    tables = [{"at": at, "global_batch_size": size} for at, size in entries]
    table = {"seq_len": 32, "global_batch_size": first, "batch_schedule": tables}
    return BatchSizes.of(TrainingConfig.model_validate(table))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], [8] * 8),
        ([("3 steps", 16)], [8, 8, 8, 16, 16, 16, 16, 16]),
        ([("768 tokens", 16)], [8, 8, 8, 16, 16, 16, 16, 16]),
        ([("769 tokens", 16)], [8, 8, 8, 8, 16, 16, 16, 16]),
        ([("1 token", 16)], [8, 16, 16, 16, 16, 16, 16, 16]),
        ([("2 steps", 16), ("1536 tokens", 4)], [8, 8, 16, 16, 4, 4, 4, 4]),
        ([("256 tokens", 32), ("5 steps", 64)], [8, 32, 32, 32, 32, 64, 64, 64]),
    ],
)
def test_the_size_of_every_step(entries: list[tuple[str, int]], expected: list[int]) -> None:
    found = sizes(*entries)
    assert [found.size(step) for step in range(1, 9)] == expected
    sums = [sum(expected[:step]) for step in range(9)]
    assert [found.sequences(step) for step in range(9)] == sums
    for count in range(sums[-1] + 1):
        assert found.step_reaching(count) == next(step for step in range(9) if sums[step] >= count)
        assert found.step_nearest(count) == min(range(9), key=lambda step: abs(sums[step] - count))
    assert found.step_nearest(-3) == found.step_reaching(-3) == 0


def test_steps_count_as_one() -> None:
    assert [STEPS.sequences(step) for step in (0, 1, 7)] == [0, 1, 7]
    assert [STEPS.step_reaching(count) for count in (-3, 0, 1, 7)] == [0, 0, 1, 7]


@pytest.mark.parametrize("ratio", [None, 0.0, 0.1, 0.25, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("grown", [False, True])
def test_equal_sizes_are_the_schedule_in_steps(ratio: float | None, kind: str, grown: bool) -> None:
    section = LRSchedulerConfig.model_validate({"warmup_steps": 7, "decay_ratio": ratio, "decay_type": kind})
    growth = GrowthConfig.model_validate({"stages": [{"at": "40 steps", "factor": 2}] if grown else []})
    in_steps = LRSchedule(section, lr=1e-3, steps=100, growth=growth)
    by_tokens = in_steps.measured_in(sizes(("30 steps", 8)))
    at = [40] if grown else []
    for step in range(1, 101):
        assert by_tokens(step, at) == pytest.approx(in_steps(step, at), rel=1e-12)


def test_warmup_and_decay_are_linear_in_tokens() -> None:
    """10 steps of 8, then 10 of 32: 400 sequences. Warmup and decay lie across the change in one test each."""
    section = LRSchedulerConfig.model_validate({"warmup_steps": 12, "decay_ratio": 0.16, "min_lr_factor": 0.1})
    schedule = LRSchedule(section, lr=1.0, steps=20, growth=GrowthConfig(), measure=sizes(("10 steps", 32)))
    assert [schedule(step) for step in (1, 10, 11, 12, 13, 18)] == pytest.approx(
        [8 / 144, 80 / 144, 112 / 144, 1.0, 1.0, 1.0]
    )
    assert [schedule(step) for step in (19, 20, 21)] == pytest.approx([1.0, 0.1 + 0.9 * 0.5, 0.1])
    across = LRSchedulerConfig.model_validate({"warmup_steps": 0, "decay_ratio": 0.9})
    schedule = LRSchedule(across, lr=1.0, steps=20, growth=GrowthConfig(), measure=sizes(("10 steps", 32)))
    assert [schedule(step) for step in (5, 6, 10, 11, 12, 20)] == pytest.approx(
        [1.0, 1.0, 1 - 32 / 360, 1 - 40 / 360, 1 - 72 / 360, 1 - 328 / 360]
    )


def plan(tmp_path: Path, num_ranks: int = 2, resume: ResumePoint | None = None, **values: Any) -> RunPlan | list[str]:
    """A plan, or its problems."""
    settings = {"training__steps": 12, "lr_scheduler__decay_ratio": 0.3, **FOUR_FOLD, **values}
    recipe = make_recipe(tmp_path / "run", **settings)
    made = plan_run(recipe, found := Findings(), num_ranks=num_ranks, device_type="cpu", resume=resume)
    return [str(problem) for problem in found.problems] if made is None else made


def test_the_plan_says_where(tmp_path: Path) -> None:
    growth = {"growth__stages__0__at": "3000 tokens", "growth__stages__0__factor": 2, "checkpoint__enable": True}
    made = plan(tmp_path, **growth)
    assert isinstance(made, RunPlan)
    lines = report_lines(made, "cpu")
    assert "  from step 5 on (1,024 tokens): 32 sequences a step" in lines
    start = lines.index("learning rate (measured in tokens, masked positions included):")
    assert lines[start + 1 : start + 3] == [
        "  from step 1: warmup to the end of step 2 (512 tokens), stable to the end of step 6 (3,072 tokens)",
        "  from step 7: warmup to the end of step 8 (5,120 tokens), stable to the end of step 9 (6,144 tokens), "
        "decay to the end of step 12 (9,216 tokens)",
    ]
    assert any("until step 6: 3,072 tokens" in line for line in lines)
    assert any("12 steps, 9,216 tokens" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"training__batch_schedule__0__global_batch_size": 10}, "training.batch_schedule.0.global_batch_size: 10"),
        ({"training__global_batch_size": 6}, "training.global_batch_size: 6 is not a multiple"),
        (
            {"training__batch_schedule__1__at": "1025 tokens", "training__batch_schedule__1__global_batch_size": 64,
             "training__batch_schedule__2__at": "5 steps", "training__batch_schedule__2__global_batch_size": 64},
            'training.batch_schedule.2.at: "5 steps" (step 5) is not after',
        ),
        (
            {"growth__stages__0__at": "3 steps", "growth__stages__0__factor": 2, "checkpoint__enable": True,
             "growth__stages__0__global_batch_size": 16},
            "growth.stages.0.global_batch_size: changes the tokens of a step",
        ),
        (
            {"growth__stages__0__at": "3 steps", "growth__stages__0__operator": "learn",
             "growth__stages__0__factor": 2, "checkpoint__enable": True},
            "growth.stages.0.operator: a learned growth",
        ),
    ],
)  # fmt: skip
def test_refused_at_plan_time(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    problems = plan(tmp_path, **values)
    assert isinstance(problems, list)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


def test_only_sizes_to_come_have_to_fit(tmp_path: Path) -> None:
    """8 sequences do not fit 8 ranks of 2 microbatches, 32 do: before the change it is refused, after it is not."""
    early, late = (ResumePoint(Progress(step=step, tokens=1, flops=1, samples=1)) for step in (3, 4))
    problems = plan(tmp_path, 8, early)
    assert isinstance(problems, list)
    assert problems[0].startswith("training.global_batch_size: 8 is not a multiple")
    assert isinstance(plan(tmp_path, 8, late), RunPlan)
    grows = {
        "growth__stages__0__at": "4 steps", "growth__stages__0__factor": 2, "growth__stages__0__num_ranks": 8,
        "checkpoint__enable": True,
    }  # fmt: skip
    assert isinstance(plan(tmp_path, 2, **grows), RunPlan), "the growth to more ranks comes with the larger batch"


@pytest.mark.parametrize("at", ["25%", "auto", "3e17 FLOPs", "slope 0.1 over 3 steps"])
def test_other_units_are_refused(at: str) -> None:
    with pytest.raises(ValueError, match="must be in steps or tokens"):
        sizes((at, 16))
