"""Lengths of the learning rate in tokens under a batch schedule: plan against run, a resume, and a cool-down."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness import WarmRanks
from tests.runs import make_recipe, read_steps, train
from titan_growth.__main__ import main
from titan_growth.commands.plan_report import report_lines
from titan_growth.config.loader import load_recipe, with_values
from titan_growth.config.schema.recipe import Recipe
from titan_growth.run.plan import plan_run
from titan_growth.tools.findings import Findings

PEAK = 1e-2
POINT = re.compile(r"(\w+) to the end of step (\d+) \(([\d,]+) tokens\)")
SETTINGS = {
    "training__steps": 12,
    "training__batch_schedule__0__at": "1000 tokens",
    "training__batch_schedule__0__global_batch_size": 32,
    "growth__stages__0__at": "3000 tokens",
    "growth__stages__0__factor": 2,
    "growth__stages__0__optimizer_state": "copy",
    "checkpoint__enable": True,
    "checkpoint__interval": 4,
    "debug__log_batch_hash": True,
}
"""256 tokens a step for 4 steps, then 1,024; a growth after step 6."""
LENGTHS = {"lr_scheduler.warmup": "500 tokens", "lr_scheduler.decay": "2k tokens"}
"""Warmups of 2 steps at first and of 1 after the growth; a decay of the last 2 steps."""


def recipe_of(folder: Path, **others: Any) -> Recipe:
    return with_values(make_recipe(folder, **{**SETTINGS, **others}), LENGTHS)


@pytest.fixture(scope="module")
def whole(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
    folder = tmp_path_factory.mktemp("lengths") / "whole"
    warm_ranks(train, 1, 1, recipe_of(folder))
    return folder


def test_the_run_does_what_the_plan_says(whole: Path) -> None:
    made = plan_run(recipe_of(whole), Findings(), num_ranks=1, device_type="cpu")
    assert made is not None
    planned = {point for line in report_lines(made, "cpu") for point in POINT.findall(line)}
    run = read_steps(whole)
    at = {line["step"]: f"{line['tokens']:,}" for line in run}
    ends = [("warmup", 2), ("stable", 6), ("warmup", 7), ("stable", 10), ("decay", 12)]
    assert planned == {(what, str(step), at[step]) for what, step in ends}
    assert [line["lr"] / PEAK for line in run] == [1 / 2, *[1.0] * 10, 1 / 2]
    assert [line["step"] for line in run if line["num_layers"] == 4] == list(range(7, 13))


@pytest.mark.slow
def test_a_resume_and_a_cool_down(warm_ranks: WarmRanks, whole: Path, tmp_path: Path) -> None:
    run, resumed, cool = read_steps(whole), whole.with_name("resumed"), tmp_path / "cool"
    shutil.copytree(whole, resumed)
    warm_ranks(train, 2, 2, recipe_of(resumed, checkpoint__load_step=8))
    for key in ("step", "lr", "tokens", "batch_hash"):
        assert [line[key] for line in read_steps(resumed)] == [line[key] for line in run]

    source = whole / "checkpoint" / "step-8"
    assert main(["branch", "--from", str(source), "--steps", "3", "--to", str(cool)]) == 0
    branch = load_recipe(["--job.config_file", str(cool / "branch.toml")])
    assert (branch.lr_scheduler.warmup, branch.lr_scheduler.decay) == ("500 tokens", "3 steps")
    warm_ranks(train, 1, 1, branch)
    found = read_steps(cool)
    assert [line["lr"] / PEAK for line in found] == [1.0, 1 - 1 / 3, 1 - 2 / 3]
    for key in ("step", "tokens", "batch_hash"):
        assert [line[key] for line in found] == [line[key] for line in run[8:11]]
