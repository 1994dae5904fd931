"""Recipes of torchtitan 0.2.2: every key of its table is known, with its default unless the text says otherwise."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import tomli

from titan_growth.config.fields import leaves
from titan_growth.config.loader import inspect_recipe, recipe_from_toml, to_toml
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.torchtitan_keys import IGNORED, NEUTRAL, ignored_because
from titan_growth.tools.findings import Findings

TORCHTITAN: dict[str, object] = json.loads(
    (Path(__file__).parents[2] / "golden" / "torchtitan_defaults.json").read_text()
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


def toml_of(key: str, value: object) -> str:
    table, _, name = key.rpartition(".")
    return f"[{table}]\n{name} = {json.dumps(value)}\n"


def inspect_text(folder: Path, text: str):
    path = folder / "recipe.toml"
    path.write_text(text)
    recipe = inspect_recipe(["--job.config_file", str(path)], found := Findings())
    return recipe, found.problems, found.warnings


def test_the_table_is_whole() -> None:
    assert len(TORCHTITAN) == 149
    assert len(SHARED) == 112


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


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("memory_estimation.any.depth", "memory_estimation.enable is false"),
        ("quantize.linear.mx.recipe_name", "model.converters does not name it"),
        ("quantize.linear.mx.deeper.key", "model.converters does not name it"),
        ("quantize.grouped_mm.float8.fqns", "there are no grouped products in a dense model"),
        ("parallelism.expert_parallel_comm_backend", "parallelism.expert_parallel_degree is 1"),
        ("parallelism.expert_parallel_comm_backend.x", None),
        ("quantize.linear.mx", None),
        ("quantize.linear.float8.recipe_name", None),
        ("quantize.other.x", None),
        ("memory_estimation", None),
        ("x", None),
    ],
)
def test_why_a_key_is_ignored(key: str, reason: str | None) -> None:
    assert ignored_because(key) == reason


def test_tables_below_a_real_table(tmp_path: Path) -> None:
    """[quantize.linear] is in the schema; what torchtitan has there besides is told apart from what nobody has."""
    text = """[quantize.linear.mx]
recipe_name = "mxfp8_cublas"
filter_fqns = ["output"]
[quantize.grouped_mm.float8]
fqns = []
[quantize.grouped_mm.mx]
[quantize.linear.fp4]
x = 1
[quantize.linear]
float9 = 3
"""
    recipe, problems, warnings = inspect_text(tmp_path, text)
    assert recipe is not None
    assert sorted(str(problem) for problem in problems) == [
        f"quantize.linear.float9: unknown key in [quantize.linear] ({tmp_path / 'recipe.toml'}:10). "
        "Did you mean 'float8'?",
        f"quantize.linear.fp4: unknown key in [quantize.linear] ({tmp_path / 'recipe.toml'}:7). "
        "See --help for the keys",
    ]
    assert [str(warning) for warning in warnings] == [
        "quantize.linear.mx.recipe_name: has no effect because model.converters does not name it "
        f"({tmp_path / 'recipe.toml'}:2)",
        "quantize.linear.mx.filter_fqns: has no effect because model.converters does not name it "
        f"({tmp_path / 'recipe.toml'}:3)",
        "quantize.grouped_mm.float8.fqns: has no effect because there are no grouped products in a dense model "
        f"({tmp_path / 'recipe.toml'}:5)",
    ]


@pytest.mark.parametrize("text", ["[memory_estimation]\n", "[quantize.grouped_mm]\n", "[experimental]\n"])
def test_an_empty_table_says_nothing(text: str, tmp_path: Path) -> None:
    _, problems, warnings = inspect_text(tmp_path, text)
    assert not problems + warnings


def test_a_value_in_the_place_of_a_table(tmp_path: Path) -> None:
    _, problems, warnings = inspect_text(tmp_path, "memory_estimation = 3\n[quantize.linear]\nmx = 3\n")
    assert {problem.key for problem in problems} == {"memory_estimation", "quantize.linear.mx"}
    assert not warnings


def test_a_date_is_refused_like_any_value(tmp_path: Path) -> None:
    _, (problem,), _ = inspect_text(tmp_path, "[training]\ngc_debug = 1979-05-27\n")
    assert problem.message.startswith('"1979-05-27" is not supported in this version')


@pytest.mark.parametrize("name", ["float8", "quantize.linear.float8"])
def test_the_older_name_of_a_converter(name: str, tmp_path: Path) -> None:
    """torchtitan's own llama3_405b.toml writes it, and torchtitan 0.2.2 does not know it any more."""
    path = tmp_path / "recipe.toml"
    recipe, problems, warnings = inspect_text(tmp_path, f"[model]\nconverters = ['{name}']\n")
    assert not problems
    assert recipe is not None
    assert recipe.model.converters == ["quantize.linear.float8"]
    expected = f"model.converters: 'float8' is an older name of 'quantize.linear.float8' ({path}:2). Write the new one"
    assert [str(warning) for warning in warnings] == ([expected] if name == "float8" else [])


def test_a_refused_list_of_converters_is_not_warned_about(tmp_path: Path) -> None:
    _, problems, warnings = inspect_text(tmp_path, "[model]\nconverters = ['float8', 'x']\n")
    assert [problem.key for problem in problems] == ["model.converters"]
    assert not warnings


@pytest.mark.parametrize(("text", "value"), [("2", "2"), ("7", "7"), ('"3"', "3"), ('"op"', "op")])
def test_a_number_of_layers_needs_no_quotes(text: str, value: str, tmp_path: Path) -> None:
    recipe, problems, _ = inspect_text(tmp_path, f"[activation_checkpoint]\nselective_ac_option = {text}\n")
    assert not problems
    assert recipe is not None
    assert recipe.activation_checkpoint.selective_ac_option == value


@pytest.mark.parametrize("text", ["0", "-2", "2.0", "true", "[2]"])
def test_not_a_number_of_layers(text: str, tmp_path: Path) -> None:
    _, problems, _ = inspect_text(tmp_path, f"[activation_checkpoint]\nselective_ac_option = {text}\n")
    assert [problem.key for problem in problems] == ["activation_checkpoint.selective_ac_option"]


@pytest.mark.parametrize("value", ["headtail", "none", "None"])
def test_load_balancers(value: str, tmp_path: Path) -> None:
    recipe = inspect_recipe(["--parallelism.context_parallel_load_balancer", value], found := Findings())
    assert not found.problems
    assert recipe is not None
    assert recipe.parallelism.context_parallel_load_balancer == value.lower()


FLAGS = [
    (
        ["--parallelism.pipeline_parallel_schedule", "InterleavedZeroBubble"],
        {"parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble"},
    ),
    (
        ["--parallelism.module_fqns_per_model_part", '[["tok_embeddings","layers.0"],["layers.1","norm","output"]]'],
        {
            "parallelism.module_fqns_per_model_part": [
                ["tok_embeddings", "layers.0"],
                ["layers.1", "norm", "output"],
            ]
        },
    ),
    (
        ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"],
        {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    ),
    (["--activation_checkpoint.selective_ac_option", "1"], {"activation_checkpoint.selective_ac_option": "1"}),
    (["--activation_checkpoint.determinism_check", "none"], {"activation_checkpoint.determinism_check": "none"}),
    (["--model.converters", "quantize.linear.float8"], {"model.converters": ["quantize.linear.float8"]}),
    (["--model.converters", "float8"], {"model.converters": ["quantize.linear.float8"]}),
    (["--compile.enable"], {"compile.enable": True, "compile.components": ["model", "loss"]}),
    (["--compile.components=model,loss"], {"compile.components": ["model", "loss"]}),
    (["--compile.enable", "--compile.components", "loss"], {"compile.enable": True, "compile.components": ["loss"]}),
    (
        ["--parallelism.tensor_parallel_degree=2", "--parallelism.disable_loss_parallel"],
        {"parallelism.tensor_parallel_degree": 2, "parallelism.disable_loss_parallel": True},
    ),
    (
        ["--parallelism.context_parallel_degree=4", "--parallelism.context_parallel_rotate_method=alltoall"],
        {"parallelism.context_parallel_degree": 4, "parallelism.context_parallel_rotate_method": "alltoall"},
    ),
    (
        ["--parallelism.pipeline-parallel-degree", "4", "--parallelism.pipeline_parallel_layers_per_stage", "1"],
        {"parallelism.pipeline_parallel_degree": 4, "parallelism.pipeline_parallel_layers_per_stage": 1},
    ),
    (
        ["--quantize.linear.float8.recipe_name", "rowwise", "--quantize.linear.float8.filter_fqns=output,wq"],
        {"quantize.linear.float8.recipe_name": "rowwise", "quantize.linear.float8.filter_fqns": ["output", "wq"]},
    ),
    (["--training.enable_cpu_offload", "True"], {"training.enable_cpu_offload": True}),
]
"""Command lines in the style of torchtitan's integration tests."""


@pytest.mark.parametrize(("words", "expected"), FLAGS, ids=[" ".join(case[0])[:60] for case in FLAGS])
def test_flags_as_torchtitans_tests_write_them(words: list[str], expected: dict[str, object]) -> None:
    recipe = inspect_recipe(words, found := Findings())
    assert not found.problems
    assert {key: functools.reduce(getattr, key.split("."), recipe) for key in expected} == expected
    # What is stored in a run's folder comes back as it was.
    assert recipe is not None
    assert recipe_from_toml(tomli.loads(to_toml(recipe))) == recipe


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
