"""Tables of plugins: from the moment a recipe names the module, its table is a table like any other."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli

from titan_growth import train
from titan_growth.config import plugins
from titan_growth.config.fields import leaves
from titan_growth.config.help import help_text
from titan_growth.config.loader import inspect_recipe, load_recipe, recipe_from_toml, to_json, to_toml, with_values
from titan_growth.config.plugins import load_plugins, recipe_class, register_table, table_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.section import Section
from titan_growth.tools.errors import ConfigError, TitanGrowthError

HEAD = """
from typing import Literal
from pydantic import Field, field_validator
from titan_growth.config.plugins import register_table
from titan_growth.config.section import Section
"""
NOISE = (
    HEAD
    + '''
class Source(Section):
    """Where it comes from."""

    seed: int = 0
    """Where it starts."""


class Noise(Section):
    """Noise on the gradients."""

    enable: bool = False
    """Add it."""
    scale: float = Field(0.1, ge=0)
    """Standard deviation."""
    kind: Literal["gauss", "uniform"] = "gauss"
    """Distribution."""
    layers: list[str] = []
    """Where."""
    source: Source = Source()
    steps: list[Source] = []

    @field_validator("layers")
    @classmethod
    def _known(cls, value):
        if "head" in value:
            raise ValueError("'head' has no noise")
        return value


register_table("noise", Noise)
'''
)

Write = Callable[[str, str], str]


class Extra(Section):
    """A table of this file."""

    size: int = 3
    """Its size."""


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry and a cache of this test's own; stages that other tests have imported keep theirs."""
    monkeypatch.setattr(plugins, "_TABLES", {})
    monkeypatch.setattr(plugins, "_extended", functools.cache(plugins._extended.__wrapped__))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules that can be imported until the end of the test."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(name: str, text: str) -> str:
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield write
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return f"--job.config_file={path}"


def problems_of(*argv: str) -> list[str]:
    return [str(problem) for problem in inspect_recipe(list(argv))[1]]


# ---- in a recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "flag", "flag and file"])
def test_a_table_of_a_plugin(where: str, plugin: Write, tmp_path: Path) -> None:
    plugin("noise_stage", NOISE)
    names = {"file": '["noise_stage"]', "flag": None, "flag and file": '["nowhere"]'}[where]
    head = f"# names a module\nplugins = {names}\n" if names else ""
    file = write_recipe(tmp_path, head + '[noise]\nenable = true\nlayers = ["a"]\n[noise.source]\nseed = 4\n')
    words = [] if where == "file" else ["--plugins", "noise_stage"]
    recipe = load_recipe(
        ["--noise.scale=1", file, "--noise.layers", "b,c", "--noise.steps.0.seed", "7", "--training.steps", "3", *words]
    )
    assert isinstance(recipe, Recipe)
    assert recipe.plugins == ["noise_stage"]
    noise = table_of(recipe, "noise")
    assert (noise.enable, noise.scale, noise.kind, noise.layers) == (True, 1.0, "gauss", ["b", "c"])
    assert (noise.source.seed, [step.seed for step in noise.steps]) == (4, [7])
    assert recipe.training.steps == 3


def test_bare_flags_of_a_plugin_are_told_apart(plugin: Write) -> None:
    """What a bare flag means depends on its type, so the plugin must be known before the flags are read."""
    plugin("noise_stage", NOISE)
    recipe = load_recipe(["--noise.enable", "--plugins=noise_stage"])
    assert table_of(recipe, "noise").enable
    found = problems_of("--noise.scale", "--plugins=noise_stage")
    assert found == ["noise.scale: the flag needs a value. Write --noise.scale VALUE"]


def test_several_plugins_and_none(plugin: Write, tmp_path: Path) -> None:
    plugin("noise_stage", NOISE)
    plugin("other", "")
    assert load_recipe(["--plugins", "noise_stage, other"]).plugins == ["noise_stage", "other"]
    file = write_recipe(tmp_path, 'plugins = ["nowhere"]\n')
    assert load_recipe([file, "--plugins="]).plugins == []
    assert load_recipe([file, "--plugins", "[]"]).plugins == []


def test_problems_in_a_plugins_table_read_like_any_other(plugin: Write, tmp_path: Path) -> None:
    plugin("noise_stage", NOISE)
    text = """plugins = ["noise_stage"]
[noise]
enable = 1
scale = -1
kind = "gaus"
layers = ["head"]
kindd = 3
[noise.source]
seeed = 3
[noize]
x = 1
[training]
stepz = 1
"""
    path = tmp_path / "recipe.toml"
    assert sorted(problems_of(write_recipe(tmp_path, text), "--noise.source.seed", "x")) == [
        f"noise.enable: expected true or false, got 1 ({path}:3)",
        f"noise.kind: must be one of 'gauss', 'uniform', got 'gaus' ({path}:5). Did you mean 'gauss'?",
        f"noise.kindd: unknown key in [noise] ({path}:7). Did you mean 'kind'?",
        f"noise.layers: 'head' has no noise ({path}:6)",
        f"noise.scale: must be at least 0, got -1 ({path}:4)",
        "noise.source.seed: expected an integer, got 'x' (--noise.source.seed)",
        f"noise.source.seeed: unknown key in [noise.source] ({path}:9). Did you mean 'seed'?",
        f"noize: unknown section ({path}:10). Did you mean 'noise'?",
        f"training.stepz: unknown key in [training] ({path}:13). Did you mean 'steps'?",
    ]


def test_without_the_plugin_its_table_is_unknown(plugin: Write, tmp_path: Path) -> None:
    plugin("noise_stage", NOISE)
    (found,) = problems_of(write_recipe(tmp_path, "[noise]\nscale = 1\n"))
    assert found.startswith("noise: unknown section (")
    assert found.endswith("Did you mean 'growth.stages.N.noise'?"), "a key of that name that is there"
    assert "noise_stage" not in sys.modules


def test_plugins_is_outside_all_tables(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, '[training]\nplugins = ["x"]\n')
    assert problems_of(file) == [
        f"training.plugins: unknown key in [training] ({tmp_path / 'recipe.toml'}:2). "
        "plugins is outside all sections: write it before the first"
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"noise_stage"', "expected a list, got 'noise_stage' ("),
        ("3", "expected a list, got 3 ("),
        ("[3]", "expected a string, got 3 ("),
    ],
)
def test_a_list_of_names(value: str, message: str, plugin: Write, tmp_path: Path) -> None:
    """The tables of plugins that cannot be known are not complained about."""
    plugin("noise_stage", NOISE)
    (found,) = problems_of(write_recipe(tmp_path, f"plugins = {value}\n[noise]\nscale = 1\n"))
    assert message in found
    assert "recipe.toml:1)" in found


BAD = [
    ("nowhere", None, "there is no module nowhere (--plugins). Install it, or put its folder on PYTHONPATH"),
    ("nowhere.stages", None, "there is no module nowhere.stages (there is no nowhere) (--plugins). Install it, "),
    ("plain.stages", "", "there is no module plain.stages (--plugins). Install it, or put its folder on PYTHONPATH"),
    ("needy", "import no_such_library", "importing needy failed with ModuleNotFoundError: No module named 'no_such"),
    (
        "two_lines",
        "raise RuntimeError('a\\nb')",
        "importing two_lines failed with RuntimeError: a b (--plugins). python",
    ),
    (
        "silent",
        "raise RuntimeError",
        'importing silent failed with RuntimeError (--plugins). python -c "import silent"',
    ),
    ("quits", "import sys; sys.exit(3)", "importing quits failed with SystemExit: 3 (--plugins)"),
    ("slip", "def f(:", "importing slip failed with SyntaxError: invalid syntax (slip.py, line 1) (--plugins)"),
    ("wordy", "raise ValueError('x' * 5000)", "importing wordy failed with ValueError: xxx"),
    (
        "clash",
        HEAD + "class T(Section):\n    x: int = 1\nregister_table('training', T)\n",
        "clash cannot be used: training: is a key of the recipe itself. Give the plugin's table another name (",
    ),
    (
        "complains",
        "from titan_growth.tools.errors import TitanGrowthError\nraise TitanGrowthError('needs a GPU')",
        "importing complains failed with needs a GPU (--plugins)",
    ),
    ("a/b.py", None, "'a/b.py' is not the name of a module (--plugins). Write it as in an import"),
    (".relative", None, "'.relative' is not the name of a module"),
    ("a,,", None, "there is no module a (--plugins)"),
    (" ", None, "holds an empty name (--plugins). Name modules, as in plugins = "),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[case[0] for case in BAD])
def test_a_plugin_that_cannot_be_loaded(name: str, text: str | None, message: str, plugin: Write) -> None:
    if text is not None:
        plugin(name.split(".")[0], text)
    found = problems_of("--plugins", name)
    assert found[0].startswith(f"plugins: {message}")
    assert all("\n" not in problem and len(problem) < 450 for problem in found)


def test_all_problems_at_once_when_a_plugin_is_missing(plugin: Write, tmp_path: Path) -> None:
    """Each plugin, each other problem, and not a word about tables that may be those of the missing one."""
    plugin("noise_stage", NOISE)
    text = 'plugins = ["noise_stage", "nowhere", ""]\n[noise]\nscale = -1\n[unknown]\nx = 1\n[training]\nstepz = 1\n'
    found = problems_of(write_recipe(tmp_path, text), "--other.x", "3")
    assert [problem.split(" (")[0] for problem in found] == [
        "plugins: there is no module nowhere",
        "plugins: holds an empty name",
        "training.stepz: unknown key in [training]",
        "noise.scale: must be at least 0, got -1",
    ]
    assert f"({tmp_path / 'recipe.toml'}:1)" in found[0]
    with pytest.raises(ConfigError) as caught:
        load_plugins(["noise_stage", "nowhere", ""])
    assert [problem.key for problem in caught.value.problems] == ["plugins", "plugins"]


def test_a_key_that_was_mistyped_is_no_plugin(plugin: Write) -> None:
    found = problems_of("--plugin", "noise_stage")
    assert found == ["plugin: is outside all sections (--plugin). Did you mean 'plugins'?"]
    assert problems_of("--plugins") == ["plugins: the flag needs a value. Write --plugins VALUE"]


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_shows_the_tables_of_plugins(plugin: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin("noise_stage", NOISE)
    file = write_recipe(tmp_path, 'plugins = ["noise_stage"]\n')
    assert "[noise]" not in help_text()
    for words in (["--plugins", "noise_stage", "--help"], [file, "--help"], ["--help", "--plugins=noise_stage"]):
        plugins._TABLES.clear()
        sys.modules.pop("noise_stage", None)
        assert train.main(words) == 0
        text = capsys.readouterr().out
        assert "\n[noise]  Noise on the gradients.\n  --noise.enable  (true | false; default false)\n" in text
        assert "  --noise.scale  (number; default 0.1)\n      Standard deviation.\n" in text
        assert "  --noise.steps.N.seed  (integer; default 0)\n" in text
        assert "--training.steps" in text
    assert train.main(["--plugins", "noise_stage", "--help", "noise"]) == 0
    text = capsys.readouterr().out
    assert "--noise.scale" in text
    assert "--training.steps" not in text


def test_help_says_what_is_wrong(plugin: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin("noise_stage", NOISE)
    for words, message in (
        (["--plugins", "nowhere", "--help"], "error: plugins: there is no module nowhere"),
        (["--job.config_file", str(tmp_path / "none.toml"), "--help"], "no such file"),
        (["--help", "noice", "--plugins", "noise_stage"], "error: there is no section 'noice'; the sections are job, "),
    ):
        assert train.main(words) == 2
        text = capsys.readouterr().out
        assert message in text
        assert text.count("\n") == 1
    assert text.endswith(", growth, noise\n")


# ---- stored recipes --------------------------------------------------------------------------------------------------


def test_an_effective_recipe_with_a_plugin_is_a_recipe(plugin: Write, tmp_path: Path) -> None:
    plugin("noise_stage", NOISE)
    recipe = load_recipe(["--plugins", "noise_stage", "--noise.scale", "0.5", "--noise.steps.0.seed", "1"])
    stored = to_toml(recipe)
    assert recipe_from_toml(tomli.loads(stored)) == recipe
    assert json.loads(to_json(recipe))["noise"]["scale"] == 0.5
    assert load_recipe([write_recipe(tmp_path, stored)]) == recipe


def test_a_stored_recipe_imports_nothing(plugin: Write, tmp_path: Path) -> None:
    plugin("noise_stage", NOISE)
    stored = {"plugins": ["noise_stage", "nowhere"], "noise": {"scale": 3.0}, "training": {"steps": 7}}
    recipe = recipe_from_toml(stored)
    assert "noise_stage" not in sys.modules
    assert type(recipe) is Recipe
    assert (recipe.plugins, recipe.training.steps) == (["noise_stage", "nowhere"], 7)
    assert "noise" in stored, "the caller's table is changed"
    load_plugins(["noise_stage"])
    assert table_of(recipe_from_toml(stored), "noise").scale == 3.0


@pytest.mark.parametrize(
    "stored",
    [
        {"noise": {"scale": 3.0}},
        {"plugins": [], "noise": {"scale": 3.0}},
        {"plugins": ["noise_stage"], "training": {"stepz": 3}},
        {"plugins": ["noise_stage"], "noise": 3},
    ],
    ids=str,
)
def test_only_tables_of_plugins_may_be_unknown(stored: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        recipe_from_toml(stored)


# ---- the class of recipes --------------------------------------------------------------------------------------------


def test_without_tables_it_is_the_core_recipe() -> None:
    assert recipe_class() is Recipe


def test_the_extended_class_is_a_recipe_in_every_respect() -> None:
    register_table("extra", Extra)
    kind = recipe_class()
    assert kind is recipe_class()
    assert issubclass(kind, Recipe)
    assert list(kind.model_fields) == [*Recipe.model_fields, "extra"]
    texts = {key: field.description for key, field in leaves(kind)}
    assert texts == {**{key: field.description for key, field in leaves(Recipe)}, "extra.size": "Its size."}
    recipe = kind.model_validate({"extra": {"size": 4}})
    assert kind().training == Recipe().training
    with pytest.raises(ValueError, match="frozen"):
        recipe.extra = Extra()  # type: ignore[attr-defined]
    for wrong in ({"extra": {"size": "4"}}, {"extra": {"sice": 4}}, {"more": {}}, {"training": {"steps": "4"}}):
        with pytest.raises(ValueError, match=r"valid integer|not permitted"):
            kind.model_validate(wrong)
    register_table("second", type("Second", (Extra,), {}))
    assert recipe_class() is not kind


def test_an_extended_recipe_travels_between_ranks() -> None:
    register_table("extra", Extra)
    recipe = recipe_class().model_validate({"extra": {"size": 4}, "training": {"steps": 7}})
    for again in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), copy.copy(recipe)):
        assert again == recipe
        assert type(again) is type(recipe)


def test_with_values_keeps_the_table() -> None:
    register_table("extra", Extra)
    recipe = recipe_class().model_validate({"extra": {"size": 4}})
    changed = with_values(recipe, {"training.steps": 3, "extra.size": 5})
    assert (table_of(changed, "extra").size, changed.training.steps, table_of(recipe, "extra").size) == (5, 3, 4)
    register_table("second", type("Second", (Extra,), {}))
    assert type(with_values(recipe, {"training.steps": 3})) is type(recipe)


def test_table_of_a_recipe_that_is_older_than_the_table() -> None:
    recipe = Recipe()
    register_table("extra", Extra)
    assert table_of(recipe, "extra") == Extra()
    with pytest.raises(AssertionError, match=r"no table \[other\] is registered"):
        table_of(recipe, "other")


def test_the_same_class_can_be_registered_again() -> None:
    register_table("extra", Extra)
    register_table("extra", Extra)
    assert "extra" in recipe_class().model_fields


class Needs(Section):
    size: int


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        ("training", Extra, "training: is a key of the recipe itself. Give the plugin's table another name"),
        ("plugins", Extra, "plugins: is a key of the recipe itself. Give the plugin's table another name"),
        ("extra", type("Second", (Extra,), {}), "extra: is the table of "),
        ("my-table", Extra, "my-table: cannot be the name of a table. Use lower-case letters, digits and _"),
        ("a.b", Extra, "a.b: cannot be the name of a table"),
        ("Extra", Extra, "Extra: cannot be the name of a table"),
        ("_extra", Extra, "_extra: cannot be the name of a table"),
        ("", Extra, "cannot be the name of a table"),
        ("model_dump", Extra, "model_dump: cannot be the name of a table"),
        ("copy", Extra, "copy: cannot be the name of a table"),
        ("table", int, "table: cannot be a table: <class 'int'> is not a subclass of config.section.Section"),
        ("table", Extra(), "table: cannot be a table: "),
        ("needs", Needs, "needs: has keys without a usable default: size. A recipe may leave the whole table out"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_table_that_cannot_be_registered(name: str, section: type[Section], message: str) -> None:
    register_table("extra", Extra)
    with pytest.raises(ConfigError) as caught:
        register_table(name, section)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, TitanGrowthError)
    assert list(plugins._TABLES) == ["extra"]
