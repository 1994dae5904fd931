"""Reports about recipes: booleans on the command line, and combinations that compute something wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from titan_growth.config.fields import leaves, without_none
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.sources import read_sources
from titan_growth.layout.pipeline_layout import SCHEDULES
from titan_growth.run.plan import plan_run
from titan_growth.tools.findings import Findings

BOOLEANS = [
    key
    for key, field in leaves(Recipe)
    if without_none(field.annotation) is bool and ".N." not in key  # of tables in lists
]


def value_of(table: object, key: str) -> object:
    for name in key.split("."):
        assert isinstance(table, dict)
        table = table[name]
    return table


@pytest.mark.parametrize("key", BOOLEANS)
def test_torchtitan_1176_a_boolean_of_the_file_is_changed_by_a_flag(key: str, tmp_path: Path) -> None:
    *parents, last = key.split(".")
    for here, words in (
        (True, (["--KEY", "false"], ["--KEY=false"], ["--KEY", "False"])),
        (False, (["--KEY", "true"], ["--KEY=true"], ["--KEY"])),
    ):
        table: dict[str, object] = {last: here}
        for name in reversed(parents):
            table = {name: table}
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
        for flag in words:
            argv = [f"--job.config_file={tmp_path / 'recipe.toml'}", *(word.replace("KEY", key) for word in flag)]
            sources = read_sources(argv)
            assert not sources.found.problems
            assert value_of(sources.values, key) is (not here)


def test_torchtitan_1176_negated_flags_are_refused_by_name() -> None:
    inspect_recipe(["--profiling.no_enable_profiling"], found := Findings())
    (problem,) = found.problems
    assert "no_enable_profiling" in str(problem)
    assert "enable_profiling" in problem.hint


@pytest.mark.parametrize("schedule", [name for name, needs in SCHEDULES.items() if needs.splits_backward])
def test_pytorch_134052_split_backward_passes_and_resharded_parameters(schedule: str) -> None:
    words = {
        "parallelism.pipeline_parallel_degree": "2",
        "parallelism.data_parallel_shard_degree": "2",
        "parallelism.pipeline_parallel_schedule": schedule,
        "parallelism.fsdp_reshard_after_forward": "always",
        "activation_checkpoint.mode": "none",
        "debug.seed": "1",
    }
    recipe = inspect_recipe([word for key, value in words.items() for word in (f"--{key}", value)], Findings())
    assert recipe is not None
    found = Findings()
    assert plan_run(recipe, found, num_ranks=4, device_type="cpu") is None
    (problem,) = found.problems
    assert problem.key == "parallelism.fsdp_reshard_after_forward"
    assert f'"always" gives wrong gradients with the {schedule}' in problem.message
