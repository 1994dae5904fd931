"""Recipes of torchtitan 0.2.2: every key of its table is known, with its default unless the text says otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titan_growth.config.fields import leaves
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema import Recipe
from titan_growth.config.torchtitan_keys import IGNORED, NEUTRAL, ignored_because

TORCHTITAN: dict[str, object] = json.loads(
    (Path(__file__).parents[1] / "golden" / "torchtitan_defaults.json").read_text()
)
"""Key -> default of all 149 leaves of torchtitan 0.2.2's JobConfig."""

OURS = {key: field for key, field in leaves(Recipe)}
SHARED = sorted(TORCHTITAN.keys() & OURS.keys())
DIFFERENT = {
    "model.hf_assets_path": None,
    "training.dataset": "stdlib",
    "checkpoint.last_save_model_only": False,
    "validation.dataset": None,
    "validation.seq_len": None,
}
"""Defaults that differ on purpose."""
NOT_KEYS = {"job.config_file": "only a flag", "model.tokenizer_path": "deprecated there; the message names the new key"}
NON_NEUTRAL_DEFAULTS = {"activation_checkpoint.mode": "selective"}
"""Defaults of torchtitan that ask for something; spelled out, they are refused by name until it exists."""


def toml_of(key: str, value: object) -> str:
    table, _, name = key.rpartition(".")
    return f"[{table}]\n{name} = {json.dumps(value)}\n"


def inspect_text(folder: Path, text: str):
    path = folder / "recipe.toml"
    path.write_text(text)
    return inspect_recipe(["--job.config_file", str(path)])


def test_the_table_is_whole() -> None:
    assert len(TORCHTITAN) == 149
    assert len(SHARED) >= 76


@pytest.mark.parametrize("key", SHARED)
def test_default_is_torchtitans_or_its_text_says_so(key: str) -> None:
    field = OURS[key]
    if key in DIFFERENT:
        assert field.default == DIFFERENT[key] != TORCHTITAN[key]
        assert "torchtitan" in (field.description or ""), f"the text of {key} does not tell torchtitan's default"
    else:
        assert field.default == TORCHTITAN[key]
        assert type(field.default) is type(TORCHTITAN[key])


@pytest.mark.parametrize("key", sorted(TORCHTITAN.keys() - OURS.keys() - NOT_KEYS.keys()))
def test_keys_without_a_counterpart_are_known(key: str, tmp_path: Path) -> None:
    """A recipe that spells out torchtitan's default loads; any other value is refused by name or warned about."""
    default = TORCHTITAN[key]
    recipe, problems, warnings = inspect_text(tmp_path, toml_of(key, "other" if default is None else default))
    assert recipe is not None
    if key in NON_NEUTRAL_DEFAULTS:
        assert len(problems) == 1
        assert problems[0].message.startswith(f'"{default}" is not supported in this version')
        return
    assert [str(problem) for problem in problems] == []
    assert len(warnings) == (1 if ignored_because(key) and key not in NEUTRAL else 0)


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_a_value_that_changes_something_is_refused_by_name(key: str, tmp_path: Path) -> None:
    neutral = NEUTRAL[key][0]
    other = {bool: not neutral, int: 2, str: "other", list: ["other"]}[type(neutral)]
    _, problems, warnings = inspect_text(tmp_path, toml_of(key, other))
    assert [problem.key for problem in problems] == [key]
    assert f"{json.dumps(other)} is not supported in this version" in problems[0].message
    assert problems[0].hint == f"Only {json.dumps(neutral)} is"
    assert not warnings


def test_true_is_not_one(tmp_path: Path) -> None:
    """In Python True == 1; a recipe with `tensor_parallel_degree = true` must not pass for degree 1."""
    _, problems, _ = inspect_text(tmp_path, "[parallelism]\ntensor_parallel_degree = true\n")
    assert [problem.key for problem in problems] == ["parallelism.tensor_parallel_degree"]


@pytest.mark.parametrize("key", [key for key in IGNORED if not key.endswith("*")])
def test_ignored_keys_warn_with_the_reason_and_origin(key: str, tmp_path: Path) -> None:
    _, problems, warnings = inspect_text(tmp_path, toml_of(key, 3))
    assert not problems
    (warning,) = warnings
    assert warning.key == key
    assert warning.message == f"has no effect because {IGNORED[key]} ({tmp_path / 'recipe.toml'}:2)"


def test_no_key_is_both_in_the_schema_and_set_aside() -> None:
    """A key that becomes supported must leave the lists, or its value would be refused although it works."""
    assert not (NEUTRAL.keys() | IGNORED.keys()) & OURS.keys()
    for key in OURS:
        assert ignored_because(key) is None, key


def test_nested_table_of_a_feature_that_is_off(tmp_path: Path) -> None:
    _, problems, warnings = inspect_text(
        tmp_path, '[quantize.linear.float8]\nfilter_fqns = ["output"]\nemulate = true\n'
    )
    assert not problems
    assert [warning.key for warning in warnings] == [
        "quantize.linear.float8.filter_fqns",
        "quantize.linear.float8.emulate",
    ]


def test_older_spelling_names_the_new_key(tmp_path: Path) -> None:
    _, problems, _ = inspect_text(tmp_path, "[training]\nseed = 3\ncompile = true\n[lr_scheduler]\nlr_min = 0.1\n")
    assert {problem.key: problem.hint for problem in problems} == {
        "training.seed": "Did you mean 'debug.seed'?",
        "training.compile": "Did you mean 'compile.enable'?",
        "lr_scheduler.lr_min": "Did you mean 'lr_scheduler.min_lr_factor'?",
    }
