"""A growth on the command line of `grow` and `probe`: the settings of [[growth.stages]], as options."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, get_origin

from pydantic import ValidationError

from titan_growth.commands.args import CommandLine, given
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.fields import parse_text, suggestion, type_text, without_none
from titan_growth.config.messages import problem_of
from titan_growth.config.schema.growth import SIZES, PlannedGrowth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import check_planned, nothing_to_rescale, with_rope_theta
from titan_growth.growth.operators.base import GrowthMap, operators
from titan_growth.growth.operators.checked import map_of
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import base_keys
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.findings import Findings

SETTINGS = ("factor", "layer_map", "n_layers", "dim", "n_heads", "n_kv_heads", "hidden_dim", "noise",
            "rescale_to_depth", "optimizer_state", "optimizer_step", "rope_theta",
            "options")  # fmt: skip
"""Besides the operator: those that mean something without a run."""

_METAVARS = {int: "N", float: "X", list: "0,1,1,2", dict: "JSON"}


def add_settings(line: CommandLine, settings: Iterable[str], **defaults: Any) -> None:
    """Adds an option for each setting, with the recipe key's text; `defaults` are the command's own."""
    for name in settings:
        field = PlannedGrowth.model_fields[name]
        annotation = without_none(field.annotation)
        text, default = " ".join((field.description or "").split()), defaults.get(name)
        if default is None and field.default not in (None, {}):
            text += f" (default: {field.default})"
        metavar = _METAVARS.get(get_origin(annotation) or annotation) or type_text(annotation)
        metavar = metavar.replace('"', "").replace(" ", "")
        line.option(f"--{name.replace('_', '-')}", metavar, text, partial(_value, name), default=default)


def settings_of(args: argparse.Namespace, settings: Iterable[str]) -> dict[str, Any]:
    """The settings that were given."""
    return {name: getattr(args, name) for name in settings if getattr(args, name) is not None}


def _value(name: str, text: str) -> Any:
    if name == "options":
        with contextlib.suppress(ValueError):
            return json.loads(given(text))
    return parse_text(given(text), PlannedGrowth.model_fields[name].annotation)


def planned_growth(settings: Mapping[str, Any]) -> PlannedGrowth:
    """A growth with these settings, at some step. Raises ConfigError for unusable values."""
    found = Findings()
    try:
        return PlannedGrowth.model_validate({"at": "1 step", **settings})
    except ValidationError as error:
        for details in error.errors():
            key = ".".join(map(str, details["loc"]))
            problem = problem_of(f"growth.stages.0.{key}", details)
            found.problem(f"--{key}" if key else "", problem.message, problem.hint)
    raise ConfigError(found.problems)


def growth_map(before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap:
    """What a planned growth makes of a model. Raises ConfigError when it does not fit."""
    known = operators()
    if planned.operator not in known:
        message = f"unknown operator '{planned.operator}'; known: {', '.join(known)}"
        raise ConfigError([Problem("--operator", message, suggestion(planned.operator, known))])
    check_planned("", planned, known[planned.operator], found := Findings())
    found.raise_if_any()
    growth = map_of(known[planned.operator], before, planned)
    if isinstance(growth, str):
        raise ConfigError([Problem("--operator", f"{planned.operator}: {growth}")])
    if planned.rescale_to_depth and (why := nothing_to_rescale(planned, growth)):
        raise ConfigError([Problem("--rescale-to-depth", why, "Remove it")])
    if planned.rope_theta == before.rope_theta:
        raise ConfigError([Problem("--rope-theta", "is what the model has already", "Remove it")])
    return with_rope_theta(growth, planned)


def model_keys(config: DecoderConfig) -> dict[str, Any]:
    """Recipe keys that make a model of these sizes out of another one."""
    return {
        **{f"model.{key}": size for key, size in config.sizes.items()},
        **({f"model.mup.{key}": size for key, size in base_keys(config.mup).items()} if config.mup else {}),
        "model.head_dim": config.head_dim,
        "model.rope_theta": config.rope_theta,
        "model.multiple_of": None,
        "model.ffn_dim_multiplier": None,
    }


def first_model_keys(config: DecoderConfig) -> dict[str, Any]:
    """Keys of `[growth.base]` for a run that starts with this model."""
    keys = {f"growth.base.{key}": getattr(config, field) for key, field in SIZES.items()}
    return {**keys, "growth.base.rope_theta": config.rope_theta}


def learning_rate_keys(recipe: Recipe, *, grows: bool) -> dict[str, Any]:
    """Keys that keep the learning rate of a checkpoint's run: `[growth.base]` counts only in recipes that grow."""
    base = recipe.growth.base
    if grows and recipe.growth.active_stages:
        return {}
    if grows:
        return {f"growth.base.{key}": None for key in ("lr", "warmup_steps", "warmup")}
    if not recipe.growth.active_stages:
        return {"growth.base": {}}
    keys: dict[str, Any] = {"growth.base": {}, "optimizer.lr": base.lr or recipe.optimizer.lr}
    if base.own_warmup is not None:
        keys |= {"lr_scheduler.warmup": base.warmup, "lr_scheduler.warmup_steps": base.warmup_steps}
    return keys


def schedule_of(recipe: Recipe) -> LRSchedule:
    """The learning rate of a checkpoint's run; its batch has been resolved."""
    lr, steps = recipe.optimizer.lr, recipe.training.steps
    measure = BatchSizes.measure_of(recipe.training, recipe.lr_scheduler, recipe.growth)
    return LRSchedule(recipe.lr_scheduler, lr=lr, steps=steps, growth=recipe.growth, measure=measure)
