"""Tables of plugins: from the moment a recipe names the module, its table is a table like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.unit.config.noise import HEAD, NOISE, Write, problems_of, write_recipe
from titan_growth import train
from titan_growth.config import plugins
from titan_growth.config.help import help_text
from titan_growth.config.loader import load_recipe
from titan_growth.config.plugins import load_plugins, table_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_tables")


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
