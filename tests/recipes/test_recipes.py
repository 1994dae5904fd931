"""Every shipped recipe plans without a problem or a warning, and comes to what its golden plan says.

After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/recipes/test_recipes.py`, and explain the difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from titan_growth.__main__ import main
from titan_growth.commands.plan import start_lines
from titan_growth.commands.plan_report import report_lines
from titan_growth.config.loader import inspect_recipe
from titan_growth.run.start import RunStart, Site, resolve
from titan_growth.tools.findings import Findings
from titan_growth.tools.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "train_configs").glob("*.toml"))
GOLDEN = ROOT / "tests" / "golden" / "plans"


WORLD_SIZES = {"study_12x64": 1, "study_12x512": 1, "llama3_70b": 256, "llama3_405b": 512}
"""How many ranks a recipe is made for, where that is not 8."""


def plan_text(recipe_file: Path, num_ranks: int, *words: str) -> str:
    """The report of `plan`; any problem or warning fails the test."""
    recipe = inspect_recipe(["--job.config_file", str(recipe_file), *words], found := Findings())
    assert recipe is not None, found.problems
    start = resolve(recipe, Site(RunFolder("a folder that is not there"), num_ranks, "cuda"))
    assert isinstance(start, RunStart)
    assert [str(problem) for problem in [*found.problems, *found.warnings, *start.warnings]] == []
    return "\n".join(report_lines(start.plan, "cuda", start_lines(start))) + "\n"


def test_there_are_recipes() -> None:
    """The default recipe is among them."""
    assert ROOT / "train_configs" / "debug_model.toml" in RECIPES


@pytest.mark.parametrize("recipe_file", RECIPES, ids=lambda path: path.stem)
def test_the_plan_is_the_golden_one(recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The command prints it, wherever it is called from, on the number of ranks that the recipe is made for."""
    monkeypatch.chdir(recipe_file.parent)
    num_ranks = WORLD_SIZES.get(recipe_file.stem, 8)
    assert main(["plan", "--job.config_file", recipe_file.name, "--world-size", str(num_ranks)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    golden = GOLDEN / f"{recipe_file.stem}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(output.out)
    assert output.out == golden.read_text()
    assert output.out == plan_text(recipe_file, num_ranks)
    assert str(ROOT) not in output.out


def test_every_golden_plan_has_a_recipe() -> None:
    """None is left over."""
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {path.stem for path in RECIPES}


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_default_recipe_runs_on_any_number_of_ranks(num_ranks: int) -> None:
    """As it is; and from scratch with the batch that pipelines want."""
    recipe_file = ROOT / "train_configs" / "debug_model.toml"
    assert "3 -> 12 layers" in plan_text(recipe_file, num_ranks)
    if num_ranks <= 2:
        batch = ["--training.global_batch_size", "8", "--training.local_batch_size", "4"]
        assert "12 layers" in plan_text(recipe_file, num_ranks, "--growth.enable", "false", *batch)


def test_the_default_recipe_logs_validates_and_saves() -> None:
    """What the quick start promises."""
    recipe = inspect_recipe(["--job.config_file", str(ROOT / "train_configs" / "debug_model.toml")], Findings())
    assert recipe is not None
    assert recipe.metrics.log_freq == 1
    assert recipe.metrics.enable_tensorboard
    assert recipe.validation.enable
    assert recipe.checkpoint.enable
    assert recipe.training.dataset == "stdlib"


def test_the_readme_names_what_exists() -> None:
    """Recipes, scripts and pages that the README points to are there, and its flags are keys of the recipe."""
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:train_configs|docs|tests|benchmarks)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), f"README.md names {path}"
    flags = re.findall(r"--([a-z_]+(?:\.\w+)+)", text)
    assert flags
    words = []
    for flag in flags:
        if flag not in ("section.key", "job.config_file", "growth.stages.0.at"):
            words += [f"--{flag}"]
    inspect_recipe(words, found := Findings())
    unknown = [problem for problem in found.problems if "unknown" in problem.message]
    assert not unknown
    commands = re.findall(r"^\./(\S+)", text, flags=re.MULTILINE)
    assert commands
    for command in commands:
        assert os.access(ROOT / command, os.X_OK), f"README.md runs {command}"
