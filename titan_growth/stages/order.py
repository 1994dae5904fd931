"""The stage registry, and the order in which stages are applied."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from titan_growth.config.messages import suggestion
from titan_growth.config.plugins import PLUGINS_KEY, origin_of, register_table
from titan_growth.config.schema.recipe import Recipe
from titan_growth.stages.base import Stage
from titan_growth.stages.flaws import flaws, unknown_tables
from titan_growth.tools.errors import ConfigError, Problem

OWN = (
    "activation_checkpoint",
    "autocast",
    "chunked_loss",
    "compile",
    "context_parallel",
    "ema",
    "float8",
    "fsdp",
    "growth_mask",
    "layer_metrics",
    "pipeline",
    "qk_clip",
    "sdc_check",
    "tensor_parallel",
    "z_loss",
)
"""The built-in stages, each in a module of its name. Named, not imported: they import torch and this module."""

_REGISTRY: dict[str, type[Stage]] = {}


def register_stage(stage: type[Any]) -> type[Any]:
    """Class decorator: registers a stage under its name. Importing a module again replaces its own stage.

    Raises:
        ConfigError: with everything that keeps the class from being a stage; nothing is registered.
    """
    if problems := _flaws(stage):
        raise ConfigError(problems)
    if stage.settings is not None:
        register_table(stage.table, stage.settings)
    _REGISTRY[stage.name] = stage
    return stage


def _flaws(stage: type[Any]) -> list[Problem]:
    """What is wrong with a would-be stage, for the plugin's author."""
    if not isinstance(stage, type):
        return [Problem("register_stage", f"takes a class, got {stage!r}", "Write @register_stage above a class")]
    name = getattr(stage, "name", None)
    other = _REGISTRY.get(name) if isinstance(name, str) else None
    return list(flaws(stage, other, is_taken=name in OWN and not _is_own(stage)))


def _is_own(stage: type[Any]) -> bool:
    return origin_of(stage).startswith("titan_growth.stages.")


def registered_stages() -> dict[str, type[Stage]]:
    """All known stages by name: built-in ones in the order of `OWN`, whatever was imported first, then plugins'."""
    for name in OWN:
        importlib.import_module(f"titan_growth.stages.{name}")  # registers it
    own = {name: _REGISTRY[name] for name in OWN}
    return own | {name: stage for name, stage in _REGISTRY.items() if name not in own}


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
    """All registered stages with their settings from the recipe, in order of application.

    Raises:
        ConfigError: when the stages have no order, or the field of one is no table of the recipe.
    """
    known = registered_stages()
    if problems := [problem for stage in known.values() for problem in unknown_tables(stage, recipe)]:
        raise ConfigError(problems)
    return [known[name].from_recipe(recipe) for name in resolve_order(known)]
