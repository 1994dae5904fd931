"""Tables that plugins add to the recipe: `plugins = ["my_pkg.stages"]` in a file, or `--plugins my_pkg.stages`.

Importing a plugin registers the TOML tables of its settings. From then on they are part of the recipe's class, and
with it of everything derived from it: flags, types, "did you mean", `--help`. So plugins are imported before any other
key is looked up. Reading a stored recipe (of a run folder, of a checkpoint) imports nothing.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError, create_model

from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.section import Section
from titan_growth.tools.errors import ConfigError, Problem, TitanGrowthError
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import one_line

PLUGINS_KEY = "plugins"

_TABLES: dict[str, type[Section]] = {}
_LOADED: dict[str, None] = {}
"""Plugins that have been loaded, in their order."""


def register_table(name: str, section: type[Section]) -> None:
    """Adds the top-level table `[name]` to the recipe. A module that is imported again replaces its own table.

    Raises:
        ConfigError: when the name is taken or cannot be a key, or when a key has no default.
    """
    if problem := _refusal(name, section):
        raise ConfigError([problem])
    _TABLES[name] = section


def _refusal(name: str, section: type[Section]) -> Problem | None:
    if not (isinstance(section, type) and issubclass(section, Section)):
        return Problem(name, f"cannot be a table: {section!r} is not a subclass of config.section.Section")
    if name in Recipe.model_fields:
        return Problem(name, "is a key of the recipe itself", "Give the plugin's table another name")
    if name in _TABLES and not same_origin(_TABLES[name], section):
        other = origin_of(_TABLES[name])
        return Problem(name, f"is the table of {other} already", "Give one of the two another name")
    # No "-": flags may be written with "-" for "_". And pydantic has attributes of its own.
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or hasattr(Recipe, name):
        return Problem(name, "cannot be the name of a table", "Use lower-case letters, digits and _, as in my_table")
    try:
        section()
    except ValidationError as error:
        keys = ", ".join(".".join(str(part) for part in details["loc"]) for details in error.errors())
        return Problem(name, f"has keys without a usable default: {keys}", "A recipe may leave the whole table out")
    return None


def origin_of(kind: type[Any]) -> str:
    """Module and name of a class: `my_package.my_module.MyStage`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def same_origin(one: type[Any], other: type[Any]) -> bool:
    """Whether two classes are the same, or the same of a module imported twice."""
    return origin_of(one) == origin_of(other)


def recipe_class() -> type[Recipe]:
    """`Recipe`, extended by every registered table."""
    return _extended(tuple(_TABLES.items())) if _TABLES else Recipe


def table_of(recipe: Recipe, name: str) -> Any:
    """A table of a recipe; a plugin's defaults when the recipe was made before the table was registered."""
    if (table := getattr(recipe, name, None)) is not None:
        return table
    assert name in _TABLES, f"no table [{name}] is registered; call register_table first"
    return _TABLES[name]()


def load_plugins(names: Sequence[str]) -> None:
    """Imports modules in order; what they register stays registered, even if a later one fails.

    Raises:
        ConfigError: with one problem for each module that is missing or does not import.
    """
    found = Findings()
    import_plugins(names, found)
    found.raise_if_any()


def import_plugins(names: Sequence[str], found: Findings) -> None:
    """Like `load_plugins`, but reports problems."""
    for name in names:
        if not name.strip():
            found.problem(PLUGINS_KEY, "holds an empty name", 'Name modules, as in plugins = ["my_package.my_stage"]')
        elif not all(part.isidentifier() for part in name.split(".")):
            hint = "Write it as in an import: my_package.my_stage"
            found.problem(PLUGINS_KEY, f"'{name}' is not the name of a module", hint)
        else:
            _import(name, found)


def require_plugins(named: Sequence[str], path: str) -> None:
    """Refuses a checkpoint whose recipe means nothing without plugins that have not been loaded.

    What a checkpoint names is never imported by itself: that would be code run by a file.

    Raises:
        ConfigError: with the exact `--plugins` to add, those that are loaded included.
    """
    given = [name for name in _LOADED if name in sys.modules]
    if any(name not in given for name in named):
        which = "the plugin" if len(named) == 1 else "the plugins"
        message = f"{path} was written with {which} {', '.join(named)}, and its recipe means nothing without"
        words = ",".join(dict.fromkeys([*given, *named]))
        hint = f"Nothing that a checkpoint names is imported by itself. If you trust it, add --plugins {words}"
        raise ConfigError([Problem(PLUGINS_KEY, message, hint)])


def _import(name: str, found: Findings) -> None:
    try:
        importlib.import_module(name)
        _LOADED[name] = None
    except ConfigError as error:
        for problem in error.problems:
            found.problem(PLUGINS_KEY, f"{name} cannot be used: {one_line(str(problem), 300)}")
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name + ".").startswith(missing + "."):
            which = "" if missing == name else f" (there is no {missing})"
            hint = "Install it, or put its folder on PYTHONPATH"
            found.problem(PLUGINS_KEY, f"there is no module {name}{which}", hint)
            return
        kind = "" if isinstance(error, TitanGrowthError) else f"{type(error).__name__}: "
        message = f"importing {name} failed with {kind}{one_line(str(error), 300)}".removesuffix(": ")
        found.problem(PLUGINS_KEY, message, f'python -c "import {name}" shows where')


class _PluginRecipe(Recipe):
    """Base of the extended classes. Pickle cannot find classes made at run time, so it stores their values."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.model_dump(),)


def _restored(values: dict[str, Any]) -> Recipe:
    """A recipe from another rank with the same plugins."""
    return recipe_class().model_validate(values)


@functools.cache
def _extended(tables: tuple[tuple[str, type[Section]], ...]) -> type[Recipe]:
    # Cached: for pydantic, equal recipes are of the same class.
    fields: dict[str, Any] = {name: (section, section()) for name, section in tables}
    return create_model("ExtendedRecipe", __base__=_PluginRecipe, __doc__=Recipe.__doc__, __module__=__name__, **fields)
