"""What a user reads about a wrong recipe: the key, the value, the place, the way out; the same from either source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titan_growth.config.fields import annotation_at, leaves
from titan_growth.config.help import help_text
from titan_growth.config.loader import inspect_recipe, load_recipe
from titan_growth.config.messages import MOVED
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.findings import Findings

WRONG = [
    ("training.steps", "ten", "expected an integer, got 'ten'", ""),
    ("training.steps", 1.5, "expected an integer, got 1.5", ""),
    ("training.steps", True, "expected an integer, got true", ""),
    ("training.steps", 0, "must be at least 1, got 0", ""),
    ("training.steps", [1], "expected an integer, got [1]", ""),
    ("optimizer.lr", "fast", "expected a number, got 'fast'", ""),
    ("optimizer.lr", True, "expected a number, got true", ""),
    ("optimizer.lr", 0.0, "must be greater than 0, got 0.0", ""),
    ("optimizer.lr", float("nan"), "expected a finite number, got nan", ""),
    ("optimizer.lr", float("inf"), "expected a finite number, got inf", ""),
    ("optimizer.beta1", 1.0, "must be less than 1, got 1.0", ""),
    ("lr_scheduler.min_lr_factor", 1.5, "must be at most 1, got 1.5", ""),
    ("debug.deterministic", "yes", "expected true or false, got 'yes'", ""),
    ("debug.deterministic", 1, "expected true or false, got 1", ""),
    ("lr_scheduler.decay_type", "x", "must be one of 'linear', 'sqrt', 'cosine', got 'x'", ""),
    ("training.stepz", 3, "unknown key in [training]", "Did you mean 'steps'?"),
    ("training.warmup_steps", 3, "unknown key in [training]", "Did you mean 'lr_scheduler.warmup_steps'?"),
    ("training.qqq", 3, "unknown key in [training]", "See --help for the keys"),
    ("training.dataloader.num_worker", 3, "unknown key in [training.dataloader]", "Did you mean 'num_workers'?"),
    ("training.dataloader", 3, "expected a table, got 3", ""),
    ("growth.stages", 3, "expected a list, got 3", ""),
    ("model.converters", ["x"], "unknown converter 'x'", "Known: quantize.linear.float8"),
    ("model.converters", ["float16"], "unknown converter 'float16'", "Did you mean 'float8'?"),
    (
        "model.converters",
        ["quantize.linear.float9"],
        "unknown converter 'quantize.linear.float9'",
        "Did you mean 'quantize.linear.float8'?",
    ),
    *(
        ("model.converters", [name], f"'{name}' is not supported in this version", "Only quantize.linear.float8 is")
        for name in ("quantize.linear.mx", "quantize.grouped_mm.float8", "quantize.grouped_mm.mx")
    ),
    ("model.converters", ["float8", "quantize.linear.float8"], "names 'quantize.linear.float8' more than once", ""),
    (
        "parallelism.context_parallel_load_balancer",
        "ptrr",
        "'ptrr' needs FlexAttention, which this version does not have",
        "Use 'headtail' or 'none'",
    ),
    (
        "parallelism.context_parallel_load_balancer",
        "",
        "must be one of 'headtail', 'none', got ''",
        "",
    ),
    *(
        (
            "activation_checkpoint.selective_ac_option",
            value,
            f"expected \"op\" or a positive integer, got '{value}'",
            'For example: "op", or "2"',
        )
        for value in ("ops", "0", "-1", "1.5", "02", "", "9" * 10)
    ),
    ("activation_checkpoint.determinism_check", "x", "must be one of 'default', 'none', got 'x'", ""),
    ("compile.components.1", ["model", "los"], "must be one of 'model', 'loss', got 'los'", "Did you mean 'loss'?"),
]


def in_file(folder: Path, key: str, value: object) -> list[str]:
    table, _, name = key.rpartition(".")
    text = {"nan": "nan", "inf": "inf"}.get(str(value)) or json.dumps(value)
    return [f"--job.config_file={write(folder, f'[{table}]{chr(10)}{name} = {text}{chr(10)}')}"]


def on_command_line(key: str, value: object) -> list[str]:
    return [f"--{key}", value if isinstance(value, str) else json.dumps(value).replace("NaN", "nan").lower()]


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("key", "value", "message", "hint"), WRONG, ids=[f"{w[0]}={w[1]}" for w in WRONG])
def test_file_and_command_line_say_the_same(key: str, value: object, message: str, hint: str, tmp_path: Path) -> None:
    # A problem with one item of a list is told with the item's number.
    written = key.removesuffix(".1")
    inspect_recipe(in_file(tmp_path, written, value), from_file := Findings())
    text = "inf" if value == float("inf") else value
    inspect_recipe(on_command_line(written, text), from_flags := Findings())
    assert [(p.key, p.message, p.hint) for p in from_file.problems] == [
        (key, f"{message} ({tmp_path / 'recipe.toml'}:2)", hint),
    ]
    assert [(p.key, p.message, p.hint) for p in from_flags.problems] == [(key, f"{message} (--{written})", hint)]


def test_an_unknown_table(tmp_path: Path) -> None:
    path = write(tmp_path, "seq_len = 3\n\n[trainig]\nsteps = 3\n")
    inspect_recipe(["--job.config_file", str(path), "--optimiser.lr", "1"], found := Findings())
    assert sorted(str(problem) for problem in found.problems) == [
        "optimiser: unknown section (--optimiser.lr). Did you mean 'optimizer'?",
        f"seq_len: is outside all sections ({path}:1). Did you mean 'training.seq_len'?",
        f"trainig: unknown section ({path}:3). Did you mean 'training'?",
    ]


def test_a_string_without_quotes(tmp_path: Path) -> None:
    """Only a file can do this: on a command line all is text."""
    path = write(tmp_path, "[job]\ndescription = 7\n")
    inspect_recipe(["--job.config_file", str(path)], found := Findings())
    assert [str(p) for p in found.problems] == [
        f'job.description: expected a string, got 7 ({path}:2). Write "7" in quotes'
    ]


def test_all_problems_of_all_sources_at_once(tmp_path: Path) -> None:
    """Wrong words, wrong types, unknown keys, wrong combinations, in one report with the line of each."""
    text = """[training]
steps = "ten"
seqlen = 4
global_batch_size = 12

[parallelism]
expert_parallel_degree = 2

[checkpoint]
keep_latest_k = 1

[[growth.stages]]
at = "5"
factor = 1
"""
    path = write(tmp_path, text)
    words = ["--job.config_file", str(path), "word", "--optimizer.lr=-1", "--training.gc_freq"]
    recipe = inspect_recipe(words, found := Findings())
    assert recipe is not None
    assert sorted(problem.key for problem in found.problems) == [
        "checkpoint.keep_latest_k",
        "command line",
        "growth.stages.0.at",
        "growth.stages.0.factor",
        "optimizer.lr",
        "parallelism.expert_parallel_degree",
        "training.gc_freq",
        "training.global_batch_size",
        "training.seqlen",
        "training.steps",
    ]
    places = {problem.key: problem.message for problem in found.problems}
    for key, line in {
        "training.steps": 2,
        "training.seqlen": 3,
        "training.global_batch_size": 4,
        "parallelism.expert_parallel_degree": 7,
        "checkpoint.keep_latest_k": 10,
        "growth.stages.0.at": 13,
        "growth.stages.0.factor": 14,
    }.items():
        assert places[key].endswith(f"({path}:{line})"), places[key]
    with pytest.raises(ConfigError) as caught:
        load_recipe(words)
    assert str(caught.value) == "\n".join(str(problem) for problem in found.problems)
    assert caught.value.exit_status == 2


def test_a_refused_value_is_not_blamed_twice(tmp_path: Path) -> None:
    """Its default stands in for it, and must not be held against the user: here 10 < 20 + 1."""
    table = "[profiling]\nenable_profiling = true\nprofiler_warmup = 20\n"
    path = write(tmp_path, table + 'profile_freq = "often"\n')
    inspect_recipe(["--job.config_file", str(path)], found := Findings())
    assert [problem.key for problem in found.problems] == ["profiling.profile_freq"]
    assert found.problems[0].message.startswith("expected an integer")
    inspect_recipe(["--job.config_file", str(write(tmp_path, table))], found := Findings())
    assert found.problems[0].message.startswith("10 is less than warmup + active = 21")


def test_a_long_value_is_cut() -> None:
    inspect_recipe(["--training.steps", "x" * 500], found := Findings())
    (problem,) = found.problems
    assert len(problem.message) < 200


def test_every_moved_key_names_one_that_exists() -> None:
    from titan_growth.config.torchtitan_keys import NEUTRAL

    for old, new in MOVED.items():
        assert annotation_at(Recipe, old.split(".")) is None, f"{old} is not moved at all"
        assert annotation_at(Recipe, new.split(".")) is not None or new in NEUTRAL, f"{old} points to {new}"


def test_help_shows_every_key_with_type_default_and_text() -> None:
    text = help_text()
    keys = list(leaves(Recipe))
    for key, field in keys:
        assert field.description, f"{key} has no text"
        line = next(line for line in text.splitlines() if line.startswith(f"  --{key}  ("))
        assert ("required" in line) == field.is_required()
    assert text.count("\n  --") == len(keys)
    assert '  --optimizer.name  (string; default "AdamW")\n      Adam, AdamW, or Muon:' in text
    assert "  --data.shuffle  (true | false; default true)" in text
    assert "  --plugins  (list of strings; default [])" in text
    assert "  --parallelism.module_fqns_per_model_part  (list of lists of strings; default none)" in text
    assert '  --compile.components  (list of "model" | "loss"; default ' in text
    assert "[plugins]" not in text
    assert "  --growth.stages.N.at  (string; required)" in text
    assert "  --debug.seed  (integer; default none)" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_of_one_table() -> None:
    text = help_text("optimizer")
    assert "--optimizer.lr" in text
    assert "--training.steps" not in text.split("[optimizer]")[1]
