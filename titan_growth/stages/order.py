"""The stage registry, and the order in which stages are applied."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from titan_growth.config.messages import suggestion
from titan_growth.config.plugins import PLUGINS_KEY, origin_of, register_table, same_origin
from titan_growth.config.schema.recipe import Recipe
from titan_growth.stages.base import Stage
from titan_growth.tools.errors import ConfigError, Problem

OWN = (
    "activation_checkpoint",
    "autocast",
    "chunked_loss",
    "compile",
    "context_parallel",
    "float8",
    "fsdp",
    "growth_mask",
    "pipeline",
    "tensor_parallel",
)
"""The built-in stages, each in a module of its name. Named, not imported: they import torch and this module."""

_REGISTRY: dict[str, type[Stage]] = {}


def register_stage(stage: type[Any]) -> type[Any]:
    """Class decorator: registers a stage under its name. Importing a module again replaces its own stage.

    Raises:
        ConfigError: with everything that keeps the class from being a stage; nothing is registered.
    """
    if problems := list(_flaws(stage)):
        raise ConfigError(problems)
    if stage.settings is not None:
        register_table(stage.table, stage.settings)
    _REGISTRY[stage.name] = stage
    return stage


def _flaws(stage: type[Any]) -> Iterator[Problem]:
    """What is wrong with a would-be stage, for the plugin's author."""
    if not isinstance(stage, type):
        yield Problem("register_stage", f"takes a class, got {stage!r}", "Write @register_stage above a class")
        return
    where = origin_of(stage)
    name, after = getattr(stage, "name", None), getattr(stage, "after", ())
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
        message = f"needs a name of lower-case letters, digits and _, has {name!r}"
        yield Problem(where, message, 'Write name = "my_stage"')
        return
    other = _REGISTRY.get(name)
    if name in OWN and not _is_own(stage):
        yield Problem(where, f"{name!r} is the name of a stage of titan_growth itself", "Give it another name")
    elif other is not None and not same_origin(other, stage):
        yield Problem(where, f"{origin_of(other)} is called {name!r} already", "Give one of the two another name")
    if not (isinstance(after, tuple | list) and all(isinstance(item, str) for item in after)):
        yield Problem(where, f"`after` must be a tuple of names, is {after!r}", 'Write after = ("pipeline",)')
    if missing := _missing(stage):
        yield Problem(where, f"lacks {', '.join(missing)}", "Derive it from Stage and write these methods")
    elif not issubclass(stage, Stage):
        hint = f"Write class {stage.__name__}(Stage)"
        yield Problem(where, "is not derived from titan_growth.stages.base.Stage", hint)
    table, settings = getattr(stage, "table", ""), getattr(stage, "settings", None)
    if bool(table) != (settings is not None):
        given, lacking = ("table", "settings") if table else ("settings", "table")
        hint = "Give both: the name of the TOML table and its Section"
        yield Problem(where, f"has `{given}` but no `{lacking}`", hint)


def _missing(stage: type[Any]) -> list[str]:
    """Stage methods that the class lacks or leaves abstract."""
    wanted = [name for name in vars(Stage) if not name.startswith("_") and callable(getattr(Stage, name))]
    abstract = getattr(stage, "__abstractmethods__", ())
    return [name for name in wanted if name in abstract or not callable(getattr(stage, name, None))]


def _is_own(stage: type[Any]) -> bool:
    return origin_of(stage).startswith("titan_growth.stages.")


def registered_stages() -> dict[str, type[Stage]]:
    """All known stages by name, built-in ones included."""
    for name in OWN:
        importlib.import_module(f"titan_growth.stages.{name}")  # registers it
    return dict(_REGISTRY)


def resolve_order(stages: Mapping[str, type[Any]]) -> list[str]:
    """Names of the stages in order of application.

    Each comes as early as its `after` allows. Ties go to plugins, in order of registration, so `fsdp`, the last
    built-in stage, comes after every stage that does not name it.

    Raises:
        ConfigError: when an `after` names an unknown stage, or when they contradict each other.
    """
    unknown = [
        Problem(
            PLUGINS_KEY,
            f"the stage {name!r} must come after {other!r}, which is not a stage",
            suggestion(other, stages) or f"The stages are {', '.join(stages)}",
        )
        for name, stage in stages.items()
        for other in stage.after
        if other not in stages
    ]
    if unknown:
        raise ConfigError(unknown)
    sorter = TopologicalSorter({name: stage.after for name, stage in stages.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        message = f"the stages cannot be ordered: {' must come after '.join(reversed(error.args[1]))}"
        raise ConfigError([Problem(PLUGINS_KEY, message, "Take one of these names out of an `after`")]) from None
    plugins_first = sorted(stages, key=lambda name: _is_own(stages[name]))
    place = {name: position for position, name in enumerate(plugins_first)}
    order: list[str] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        earliest = min(ready, key=place.__getitem__)
        ready.remove(earliest)
        order.append(earliest)
        sorter.done(earliest)
    return order


def stages_of(recipe: Recipe) -> list[Stage]:
    """All registered stages with their settings from the recipe, in order of application."""
    known = registered_stages()
    return [known[name].from_recipe(recipe) for name in resolve_order(known)]
