"""Recipes from files and command lines: every form of a flag, the same validator for both, all problems at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from titan_growth.config.loader import inspect_recipe, load_recipe, recipe_from_toml, to_json, to_toml, with_values
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.findings import Findings

STAGES = """
[checkpoint]
enable = true
[[growth.stages]]
at = "10 steps"
factor = 2
[[growth.stages]]
at = "20 steps"
factor = 3
"""


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return f"--job.config_file={path}"


def problems_of(*argv: str) -> list[str]:
    inspect_recipe(list(argv), found := Findings())
    return [str(problem) for problem in found.problems]


# ---- the forms of a flag ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["--training.steps", "7"], "training.steps", 7),
        (["--training.steps=7"], "training.steps", 7),
        (["--training.steps=1_000"], "training.steps", 1000),
        (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
        (["--optimizer.lr", "1e-3"], "optimizer.lr", 1e-3),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--debug.deterministic", "true"], "debug.deterministic", True),
        (["--debug.deterministic", "True"], "debug.deterministic", True),
        (["--debug.deterministic=true"], "debug.deterministic", True),
        (["--debug.deterministic"], "debug.deterministic", True),
        (["--debug.deterministic", "--debug.seed", "3"], "debug.deterministic", True),
        (["--data.shuffle", "false"], "data.shuffle", False),
        (["--data.shuffle=false"], "data.shuffle", False),
        (["--training.global-batch-size", "16"], "training.global_batch_size", 16),
        (["--job.description", "a = b, #c"], "job.description", "a = b, #c"),
        (["--job.description=a=b"], "job.description", "a=b"),
        (["--job.description", "7"], "job.description", "7"),
        (["--job.description="], "job.description", ""),
        (["--model.n_layers", "none"], "model.n_layers", None),
        (["--lr_scheduler.decay_ratio", "0.5"], "lr_scheduler.decay_ratio", 0.5),
        (["--training.dataloader.num_workers", "2"], "training.dataloader.num_workers", 2),
        (["--training.dataloader", "{num_workers = 2}"], "training.dataloader.num_workers", 2),
        (["--lr_scheduler.decay_type", "cosine"], "lr_scheduler.decay_type", "cosine"),
        (["--training.steps", "3", "--training.steps", "4"], "training.steps", 4),
    ],
)
def test_every_form_of_a_flag(words: list[str], key: str, expected: object) -> None:
    found: object = load_recipe(words)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps"], "command line: unexpected 'steps'. Write --section.key value"),
        (["-h"], "command line: unexpected '-h'. Write --section.key value"),
        (["--"], "command line: unexpected '--'. Write --section.key value"),
        (["--=3"], "command line: unexpected '--=3'. Write --section.key value"),
        (["--training..steps=3"], "command line: unexpected '--training..steps=3'. Write --section.key value"),
        (["--training.steps"], "training.steps: the flag needs a value. Write --training.steps VALUE"),
        (
            ["--training.steps", "--data.shuffle"],
            "training.steps: the flag needs a value. Write --training.steps VALUE",
        ),
        (["--job.config_file"], "job.config_file: the flag needs a value. Write --job.config_file VALUE"),
    ],
)
def test_a_command_line_that_cannot_be_read(words: list[str], message: str) -> None:
    assert problems_of(*words) == [message]


# ---- growths by number -----------------------------------------------------------------------------------------------


def test_one_growth_of_the_file_is_changed_by_number(tmp_path: Path) -> None:
    recipe = load_recipe([write(tmp_path, STAGES), "--growth.stages.1.at", "30 steps", "--growth.stages.1.lr=1e-4"])
    assert [(stage.at, stage.factor, stage.lr) for stage in recipe.growth.stages] == [
        ("10 steps", 2, None),
        ("30 steps", 3, 1e-4),
    ]


@pytest.mark.parametrize("base", ["", STAGES])
def test_a_growth_is_added_behind_the_last(base: str, tmp_path: Path) -> None:
    number = base.count("[[")
    words = [f"--growth.stages.{number}.at", "3k steps", f"--growth.stages.{number}.factor", "4", "--checkpoint.enable"]
    recipe = load_recipe([write(tmp_path, base), *words])
    assert len(recipe.growth.stages) == number + 1
    assert (recipe.growth.stages[-1].at, recipe.growth.stages[-1].factor) == ("3k steps", 4)


def test_growths_as_one_value() -> None:
    recipe = load_recipe(["--growth.stages", '[{at = "3 steps", factor = 2}]', "--checkpoint.enable"])
    assert [stage.at for stage in recipe.growth.stages] == ["3 steps"]


def test_a_growth_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path, STAGES)
    wanted = "growth.stages.5.at: there is no item 5 (growth.stages has 2). Items are counted from 0"
    assert problems_of(file, "--growth.stages.5.at", "1 step") == [wanted]
    wanted = "growth.stages.x.at: there is no item x (growth.stages has 2). Items are counted from 0"
    assert problems_of(file, "--growth.stages.x.at", "1 step") == [wanted]
    wanted = "growth.stages.1: names an item of a list, not a key of it. Write --growth.stages.1.KEY VALUE"
    assert problems_of(file, "--growth.stages.1", "1 step") == [wanted]


def test_an_added_growth_must_be_whole() -> None:
    found = problems_of("--growth.stages.0.at", "3 steps", "--checkpoint.enable")
    assert found == []  # how large it becomes depends on the operator, which the plan asks
    found = problems_of("--growth.stages.0.factor", "3", "--checkpoint.enable")
    assert found == ["growth.stages.0.at: is missing; expected string"]


# ---- layers and files ------------------------------------------------------------------------------------------------


def test_the_command_line_lies_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "[training]\nsteps = 5\nseq_len = 64\n")
    recipe = load_recipe(["--training.steps", "6", file])
    assert (recipe.training.steps, recipe.training.seq_len, recipe.training.local_batch_size) == (6, 64, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file. Give the path of a TOML recipe"),
        (b"[training\n", "is not valid TOML: "),
        (b"[a]\nx = 1\nx = 2\n", "is not valid TOML: "),
        (b"a = '\xff'\n", "is not UTF-8 text (byte 5). Save the recipe as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems_of("--job.config_file", str(path))
    assert problem.startswith(f"job.config_file {path}: {message}")
    with pytest.raises(ConfigError):
        load_recipe(["--job.config_file", str(path)])


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert problems_of("--job.config_file", str(tmp_path)) == [
        f"job.config_file {tmp_path}: is a folder. Give the path of a TOML recipe"
    ]


def test_a_table_and_a_value_in_its_place(tmp_path: Path) -> None:
    found = problems_of(write(tmp_path, "training = 3\n"), "--training.steps", "3")
    assert found[0] == "training.steps: training is a value, not a table"
    assert found[1].startswith("training: expected a table, got 3 (")


# ---- the effective recipe --------------------------------------------------------------------------------------------


def test_the_effective_recipe_round_trips_through_toml(tmp_path: Path) -> None:
    hostile = 'a "quote", a \\ backslash, a\nline, a tab\t and [brackets] # é 漢'
    argv = [write(tmp_path, STAGES), "--job.description", hostile, "--optimizer.lr", "1e-7", "--debug.seed", str(2**62)]
    for recipe in (Recipe(), load_recipe(argv)):
        again = recipe_from_toml(tomli.loads(to_toml(recipe)))
        assert again == recipe
        assert to_toml(again) == to_toml(recipe)
        assert Recipe.model_validate_json(to_json(recipe)) == recipe


def test_the_effective_recipe_is_a_recipe(tmp_path: Path) -> None:
    """A run folder's recipe.toml can be given back as --job.config_file."""
    recipe = load_recipe([write(tmp_path, STAGES)])
    path = tmp_path / "effective.toml"
    path.write_text(to_toml(recipe))
    assert load_recipe(["--job.config_file", str(path)]) == recipe


def test_with_values_validates_and_leaves_the_original(tmp_path: Path) -> None:
    recipe = load_recipe([write(tmp_path, STAGES)])
    changed = with_values(recipe, {"training.dataloader.num_workers": 2, "debug.seed": 3})
    assert (changed.training.dataloader.num_workers, changed.debug.seed) == (2, 3)
    assert recipe.debug.seed is None
    assert changed.growth == recipe.growth
    with pytest.raises(ValueError, match="seed"):
        with_values(recipe, {"debug.seed": "three"})


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().training.steps = 3  # type: ignore[misc]


def test_config_is_read_without_torch() -> None:
    """`--help` and the complaint about a typo must not take the seconds that importing torch takes."""
    modules = [
        "titan_growth.config.loader",
        "titan_growth.config.help",
        "titan_growth.commands.check",
        "titan_growth.metrics.boards",
        "titan_growth.metrics.profiling",
        "titan_growth.metrics.recorder",
    ]
    code = (
        f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'tensorboard', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert run.stdout.strip() == "[]"
