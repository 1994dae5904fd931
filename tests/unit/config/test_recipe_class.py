"""The class of recipes that plugins have given tables, and recipes that were stored with one."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import tomli

from tests.unit.config.noise import NOISE, Write, write_recipe
from titan_growth.config import plugins
from titan_growth.config.fields import leaves
from titan_growth.config.loader import load_recipe, recipe_from_toml, to_json, to_toml, with_values
from titan_growth.config.plugins import load_plugins, recipe_class, register_table, table_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.section import Section
from titan_growth.tools.errors import ConfigError, TitanGrowthError

pytestmark = pytest.mark.usefixtures("no_tables")


class Extra(Section):
    """A table of this file."""

    size: int = 3
    """Its size."""


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
