"""From argv to a checked `Recipe`, or to one `ConfigError` that lists every problem.

    defaults < TOML file < command line  ->  one validator  ->  checks across tables  ->  Recipe

All problems are reported together. The default replaces a refused value, so that checks of several keys still run.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import tomli_w
from pydantic import ValidationError

from titan_growth.config.checks import check_recipe
from titan_growth.config.messages import problem_of, unknown_key
from titan_growth.config.plugins import PLUGINS_KEY, recipe_class
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.sources import Sources, read_sources
from titan_growth.config.torchtitan_keys import NEUTRAL, holds_known_keys, ignored_because, warn_of_older_spellings
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.findings import Findings
from titan_growth.tools.logs import logger


def load_recipe(argv: list[str]) -> Recipe:
    """Reads and checks a recipe from command-line words such as `--job.config_file F --training.steps 10`.

    Raises:
        ConfigError: with all problems of file and command line.
    """
    found = Findings()
    recipe = inspect_recipe(argv, found)
    found.raise_if_any()
    assert recipe is not None, "a recipe without problems can be made"
    for warning in found.warnings:
        logger.warning("%s", warning)
    return recipe


def inspect_recipe(argv: list[str], found: Findings) -> Recipe | None:
    """Like `load_recipe`, but reports problems, and returns a recipe with defaults in place of refused values."""
    try:
        sources = read_sources(argv)
    except ConfigError as error:
        found.problems += error.problems
        return None
    recipe = _validate(sources)
    found.extend(sources.found)
    return recipe


def recipe_from_toml(table: dict[str, Any]) -> Recipe:
    """A recipe from a table that this program wrote (in a run folder or a checkpoint).

    Nothing is imported: a checkpoint may come from anywhere. Tables of plugins that are not loaded are left out.
    """
    root = recipe_class()
    if table.get(PLUGINS_KEY):
        table = {key: value for key, value in table.items() if key in root.model_fields or not isinstance(value, dict)}
    return root.model_validate(table)


def to_toml(recipe: Recipe) -> str:
    """The effective recipe, every key spelled out, as TOML."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True), multiline_strings=False)


def to_json(recipe: Recipe) -> str:
    """The effective recipe as JSON."""
    return json.dumps(recipe.model_dump(), indent=2) + "\n"


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """A copy with some dotted keys replaced (and validated again)."""
    table = recipe.model_dump()
    for key, value in values.items():
        *parents, last = key.split(".")
        node = table
        for name in parents:
            node = node[name]
        node[last] = value
    return type(recipe).model_validate(table)


def dry_run_of(recipe: Recipe) -> Recipe:
    """The recipe of a dry run (`comm.mode`): one step that leaves nothing behind. Other recipes are unchanged."""
    if recipe.comm.mode == "default":
        return recipe
    sections = ("checkpoint", "growth", "validation")
    off: dict[str, object] = {f"{section}.enable": False for section in sections}
    return with_values(recipe, {**off, "training.steps": 1, "metrics.enable_tensorboard": False})


def _validate(sources: Sources) -> Recipe | None:
    """The validated recipe, with defaults in place of refused values."""
    values = copy.deepcopy(sources.values)
    refused: set[str] = set()
    recipe: Recipe | None = None
    root = recipe_class()
    # Each round takes out what was refused and tries again.
    for _ in range(20):
        try:
            recipe = root.model_validate(values)
            break
        except ValidationError as error:
            for details in error.errors():
                _refuse(details, values, sources, refused)
    older = Findings()
    warn_of_older_spellings(sources.values, older)
    older.warnings = [warning for warning in older.warnings if warning.key not in refused]
    sources.take(older)
    if recipe is not None:
        checked = Findings()
        check_recipe(recipe, checked)
        # A problem of a refused key would be one of its default.
        checked.problems = [
            problem
            for problem in checked.problems
            if not any(problem.key.startswith(key) or key in problem.message for key in refused)
        ]
        sources.take(checked)
    return recipe


def _refuse(details: Any, values: dict[str, Any], sources: Sources, refused: set[str]) -> None:
    """Takes out one value that the validator refused, and reports it."""
    path = [str(part) for part in details["loc"]]
    key = ".".join(path)
    value = _stood_in(values, path) or _take_out(values, path)
    found = Findings()
    if details["type"] != "extra_forbidden":
        found.problems.append(problem_of(key, details))
        refused.add(key)
    elif not (sources.plugins_missing and len(path) == 1 and isinstance(value, dict)):
        _check_torchtitan(key, value, found)  # else perhaps the table of the missing plugin
    sources.take(found)


def _check_torchtitan(key: str, value: Any, found: Findings) -> None:
    """Reports a key that is not in the schema, or the keys of such a table."""
    if isinstance(value, dict) and holds_known_keys(key):
        for name, item in value.items():
            _check_torchtitan(f"{key}.{name}", item, found)
    elif key in NEUTRAL:
        if not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[key]):
            # default=str: JSON has no dates.
            given, neutral = json.dumps(value, default=str), json.dumps(NEUTRAL[key][0])
            found.problem(key, f"{given} is not supported in this version", f"Only {neutral} is")
    elif (reason := ignored_because(key)) is not None:
        found.warn(key, f"has no effect because {reason}")
    else:
        found.problems.append(unknown_key(key, value))


_SOME_TIME = "1 step"


def _stood_in(values: dict[str, Any], path: list[str]) -> bool:
    """Puts another time in place of a growth's refused one, so that the rest of the growth is checked as well."""
    if path[:2] != ["growth", "stages"] or path[3:] != ["at"]:
        return False
    stages = values["growth"]["stages"]
    number: Any = int(path[2])
    if not isinstance(stages[number], dict) or stages[number].get("at") in (None, _SOME_TIME):
        return False
    stages[number]["at"] = _SOME_TIME
    return True


def _take_out(values: dict[str, Any], path: list[str]) -> Any:
    """Removes and returns a refused value; for a problem inside a list the whole list, since items have no default."""
    node = values
    for name in path[:-1]:
        child = node.get(name)
        if not isinstance(child, dict):
            return node.pop(name, None)
        node = child
    return node.pop(path[-1], None)
