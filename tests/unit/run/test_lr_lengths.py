"""Lengths of the learning rate with a unit: `lr_scheduler.warmup`, `decay` and `total`, in tokens above all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.runs import argv_of, make_recipe
from titan_growth.commands.plan_report import report_lines
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.loader import inspect_recipe, recipe_from_toml, to_toml, with_values
from titan_growth.config.schema.growth import GrowthConfig
from titan_growth.config.schema.recipe import LRSchedulerConfig
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.plan import RunPlan, plan_run
from titan_growth.run.watchdog import Watchdog
from titan_growth.tools.findings import Findings

EVEN = BatchSizes((8,), seq_len=32)
"""256 tokens a step."""
FOUR_FOLD = BatchSizes((8, 32), (0, 10), seq_len=32)
"""256 tokens a step for 10 steps, then 1,024."""


def schedule(batches: BatchSizes, steps: int = 20, growth: GrowthConfig | None = None, **section: Any) -> LRSchedule:
    table = LRSchedulerConfig.model_validate(section)
    return LRSchedule(table, lr=1.0, steps=steps, growth=growth or GrowthConfig(), measure=batches)


@pytest.mark.parametrize(
    ("batches", "section", "warm", "stable", "total"),
    [
        (EVEN, {"warmup": "1024 tokens", "decay": "1280 tokens"}, 4, 15, 20),
        # Whole steps: a warmup ends with the step that reaches its tokens, a decay begins at the nearest end of one.
        (EVEN, {"warmup": "1025 tokens", "decay": "1279 tokens"}, 5, 15, 20),
        (EVEN, {"warmup": "1025 tokens", "decay": "1409 tokens"}, 5, 14, 20),
        (EVEN, {"warmup": "1 token", "decay": "1 token"}, 1, 19, 20),
        (EVEN, {"warmup": "1k tokens", "decay_ratio": 0.25}, 4, 15, 20),
        (EVEN, {"warmup_steps": 4, "decay": "1280 tokens", "total": "4096 tokens"}, 4, 11, 16),
        (EVEN, {"warmup_steps": 4, "decay": "1280 tokens", "total": "8000 tokens"}, 4, 27, 32),
        (EVEN, {"warmup": "1M tokens", "decay": "1280 tokens"}, 20, 20, 20),
        (EVEN, {"warmup": "1024 tokens", "decay": "1M tokens"}, 4, 4, 20),
        (EVEN, {"warmup": "1024 tokens"}, 4, 4, 20),
        # The lengths lie across the change of the batch.
        (FOUR_FOLD, {"warmup": "4608 tokens", "decay": "5120 tokens"}, 12, 15, 20),
        (FOUR_FOLD, {"warmup": "1024 tokens", "decay": "10752 tokens"}, 4, 8, 20),
        (FOUR_FOLD, {"warmup": "1024 tokens", "decay": "4 steps", "total": "7680 tokens"}, 4, 11, 15),
    ],
)
def test_where_lengths_end(batches: BatchSizes, section: dict[str, Any], warm: int, stable: int, total: int) -> None:
    found = schedule(batches, **section)
    segment = found.segment(1)
    assert (segment.warmup_steps, found.stable_steps(segment), found.total_steps) == (warm, stable, total)
    assert found(warm) == 1.0
    assert warm == 1 or found(warm - 1) < 1.0
    if stable < min(total, 20):
        assert found(stable + 1) == 1.0, "the first step of a decay is still at the peak"
        assert stable + 1 == total or found(stable + 2) < 1.0
        assert found(total) > 0.0, "the last step does not learn"
    assert found(total + 1) == 0.0


def test_even_steps_are_the_schedule_in_steps() -> None:
    tokens = schedule(EVEN, warmup="1792 tokens", decay="1280 tokens", min_lr_factor=0.1)
    steps = LRSchedulerConfig(warmup_steps=7, decay_ratio=0.25, min_lr_factor=0.1)
    plain = LRSchedule(steps, lr=1.0, steps=20, growth=GrowthConfig())
    assert [tokens(step) for step in range(1, 22)] == [plain(step) for step in range(1, 22)]


@pytest.mark.parametrize("policy", ["restart", "rewarm", "rewarm_new"])
def test_the_warmup_of_a_growth_has_the_same_tokens(policy: str) -> None:
    """4,096 tokens are 16 steps of 256, but 4 of 1,024: it is counted anew from each growth."""
    growth = GrowthConfig.model_validate({"stages": [{"at": "20 steps", "factor": 2, "lr_policy": policy}]})
    batches = BatchSizes((8, 32), (0, 18), seq_len=32)
    found = schedule(batches, steps=40, growth=growth, warmup="4096 tokens", decay="2048 tokens")
    shape = found.fresh_share if policy == "rewarm_new" else found
    assert [found(step, [20]) for step in (4, 15, 16, 17)] == [1 / 4, 15 / 16, 1.0, 1.0]
    assert [shape(step, [20]) for step in range(20, 26)] == [1.0, 1 / 4, 2 / 4, 3 / 4, 1.0, 1.0]
    assert [found(step, [20]) for step in (38, 39, 40)] == [1.0, 1.0, 1 / 2]


@pytest.mark.parametrize(("warmup", "steps"), [("2048 tokens", 2), ("300 steps", 20), ("3 steps", 3)])
def test_a_growth_and_its_base_have_warmups_of_their_own(warmup: str, steps: int) -> None:
    table = {"base": {"warmup": "512 tokens"}, "stages": [{"at": "20 steps", "factor": 2, "warmup": warmup}]}
    growth = GrowthConfig.model_validate(table)
    batches = BatchSizes((8, 32), (0, 18), seq_len=32)
    found = schedule(batches, steps=40, growth=growth, warmup="4096 tokens", decay="2048 tokens")
    assert [found(step, [20]) for step in (1, 2, 3)] == [1 / 2, 1.0, 1.0]
    assert found.segment(21, [20]).warmup_steps == steps
    assert found(20 + steps, [20]) == 1.0
    assert found(20 + steps - 1, [20]) == pytest.approx(1 - 1 / steps)


def test_a_warmup_without_effect_measures_nothing_in_tokens() -> None:
    """It would refuse a growth that changes the tokens of a step."""
    stage = {"at": "20 steps", "factor": 2, "warmup": "512 tokens", "lr_policy": "continue"}
    assert GrowthConfig.model_validate({"stages": [stage]}).in_tokens == []
    assert GrowthConfig.model_validate({"stages": [{**stage, "lr_policy": "rewarm"}]}).in_tokens == [
        "growth.stages.0.warmup"
    ]


@pytest.mark.parametrize("key", ["growth.base", "growth.stages.0"])
def test_two_warmups_of_one_growth_are_refused(tmp_path: Path, key: str) -> None:
    stage = ["--growth.stages.0.at", "3 steps", "--growth.stages.0.factor", "2", "--checkpoint.enable", "true"]
    (problem,) = recipe_with(tmp_path, *stage, f"--{key}.warmup", "500 tokens", f"--{key}.warmup_steps", "3")
    assert problem.startswith(f"{key}: gives both warmup and warmup_steps")
    (problem,) = recipe_with(tmp_path, *stage, f"--{key}.warmup", "25%")
    assert problem.startswith(f"{key}.warmup: must be in steps or tokens")


def plan(tmp_path: Path, found: Findings, lengths: dict[str, str], **values: Any) -> RunPlan | None:
    """A plan of 12 steps of 256 tokens. The lengths are laid over a recipe that has others."""
    recipe = make_recipe(tmp_path / "run", training__steps=12, **values)
    recipe = with_values(recipe, {f"lr_scheduler.{key}": text for key, text in lengths.items()})
    return plan_run(recipe, found, num_ranks=1, device_type="cpu")


TOKENS = {"warmup": "500 tokens", "decay": "768 tokens"}
GROWS = {"growth__stages__0__at": "1500 tokens", "growth__stages__0__factor": 2, "checkpoint__enable": True}


def recipe_with(tmp_path: Path, *words: str) -> list[str]:
    """The problems of a recipe."""
    inspect_recipe([*argv_of({"training.dataset_path": str(tmp_path)}), *words], found := Findings())
    return [str(problem) for problem in found.problems]


@pytest.mark.parametrize(
    ("key", "value", "other", "its"),
    [
        ("warmup", "2M tokens", "warmup_steps", "200"),
        ("decay", "2M tokens", "decay_ratio", "0.1"),
        ("total", "2M tokens", "total_steps", "10"),
    ],
)
def test_both_are_refused(tmp_path: Path, key: str, value: str, other: str, its: str) -> None:
    words = [f"--lr_scheduler.{key}", value, f"--lr_scheduler.{other}", its]
    (problem,) = recipe_with(tmp_path, *words)
    assert problem.startswith(f"lr_scheduler.{key}: conflicts with lr_scheduler.{other} = {its}")
    assert recipe_with(tmp_path, *words[:2]) == recipe_with(tmp_path, *words[2:]) == []


@pytest.mark.parametrize("value", ["25%", "auto", "3e17 FLOPs", "2M", "slope 0.1 over 3 steps", "0 steps"])
def test_other_units_are_refused(tmp_path: Path, value: str) -> None:
    (problem,) = recipe_with(tmp_path, "--lr_scheduler.warmup", value)
    assert problem.startswith("lr_scheduler.warmup: ")


def test_a_saved_recipe_can_be_read_again(tmp_path: Path) -> None:
    """warmup_steps has a default, which must not stand beside `warmup`."""
    words = argv_of({"training.dataset_path": str(tmp_path), "lr_scheduler.warmup": "500 tokens"})
    recipe = inspect_recipe(words, Findings())
    assert recipe is not None
    table = tomli.loads(to_toml(with_values(recipe, {"training.steps": 7})))
    assert "warmup_steps" not in table["lr_scheduler"]
    assert recipe_from_toml(table).lr_scheduler == recipe.lr_scheduler
    file = tmp_path / "saved.toml"
    file.write_text(to_toml(recipe))
    again = inspect_recipe(["--job.config_file", str(file)], found := Findings())
    assert again is not None
    assert (again.lr_scheduler, found.problems) == (recipe.lr_scheduler, [])


def test_the_plan_says_where(tmp_path: Path) -> None:
    made = plan(tmp_path, Findings(), TOKENS, **GROWS)
    assert made is not None
    lines = report_lines(made, "cpu")
    start = lines.index("learning rate (measured in tokens, masked positions included):")
    assert lines[start + 1 : start + 3] == [
        "  from step 1: warmup to the end of step 2 (512 tokens), stable to the end of step 6 (1,536 tokens)",
        "  from step 7: warmup to the end of step 8 (2,048 tokens), stable to the end of step 9 (2,304 tokens), "
        "decay to the end of step 12 (3,072 tokens)",
    ]
    assert Watchdog.of(made).schedule.warmup_after(6) == 2


@pytest.mark.parametrize(("key", "value"), [("global_batch_size", 16), ("seq_len", 64)])
def test_growths_that_change_the_tokens_of_a_step_are_refused(tmp_path: Path, key: str, value: int) -> None:
    values = {**GROWS, f"growth__stages__0__{key}": value}
    found = Findings()
    assert plan(tmp_path, found, TOKENS, **values) is None
    (problem,) = found.problems
    assert (problem.key, problem.message) == (
        f"growth.stages.0.{key}",
        "changes the tokens of a step, which lr_scheduler.warmup is given in",
    )
    found = Findings()
    assert plan(tmp_path, found, {}, **values, growth__stages__0__warmup="500 tokens") is None
    assert found.problems[0].message == "changes the tokens of a step, which growth.stages.0.warmup is given in"
    assert plan(tmp_path, Findings(), {"warmup": "2 steps", "decay": "3 steps"}, **values) is not None


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (
            {"warmup": "4k tokens"},
            ["lr_scheduler.warmup: 16 is longer than the 12 steps it is for"],
        ),
        ({"decay": "4k tokens"}, ["lr_scheduler.decay: 12 steps are more than the 10 that the warmup leaves"]),
        ({"decay": "11 steps"}, ["lr_scheduler.decay: 11 steps are more than the 10 that the warmup leaves"]),
        ({"decay": "10 steps"}, []),
        ({"total": "2k tokens"}, ["lr_scheduler.total: 8 steps are less than training.steps = 12; the rest"]),
        ({"total": "3k tokens"}, []),
    ],
)
def test_lengths_that_do_not_fit_are_told(tmp_path: Path, lengths: dict[str, str], expected: list[str]) -> None:
    found = Findings()
    assert plan(tmp_path, found, lengths) is not None
    told = [str(warning) for warning in found.warnings if warning.key.startswith("lr_scheduler")]
    assert len(told) == len(expected)
    assert all(line.startswith(start) for line, start in zip(told, expected, strict=True)), told
