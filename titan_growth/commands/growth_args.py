"""A growth that a command line describes (`grow`, `probe`): settings of [[growth.stages]], written as options."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, get_origin

from pydantic import ValidationError

from titan_growth.commands.args import CommandLine, given
from titan_growth.config.fields import parse_text, suggestion, type_text, without_none
from titan_growth.config.messages import problem_of
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.chain import check_planned
from titan_growth.growth.operators.base import GrowthMap, operators
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.findings import Findings

SETTINGS = ("factor", "layer_map", "n_layers", "dim", "n_heads", "n_kv_heads", "hidden_dim", "noise",
            "optimizer_state", "optimizer_step", "options")  # fmt: skip
"""Besides the operator: what means something without a run."""

_METAVARS = {int: "N", float: "X", list: "0,1,1,2", dict: "JSON"}


def add_settings(line: CommandLine, settings: Iterable[str], **defaults: Any) -> None:
    """Adds an option for each of these settings, with the text of the recipe's key, and defaults of the command."""
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
    """Those of the settings that were given."""
    return {name: getattr(args, name) for name in settings if getattr(args, name) is not None}


def _value(name: str, text: str) -> Any:
    if name == "options":
        with contextlib.suppress(ValueError):
            return json.loads(given(text))
    return parse_text(given(text), PlannedGrowth.model_fields[name].annotation)


def planned_growth(settings: Mapping[str, Any]) -> PlannedGrowth:
    """A growth with these settings; when it happens is up to the caller. Raises ConfigError for unusable values."""
    try:
        return PlannedGrowth.model_validate({"at": "1 step", **settings})
    except ValidationError as error:
        raise ConfigError([_on_command_line(details) for details in error.errors()]) from None


def _on_command_line(details: Any) -> Problem:
    key = ".".join(map(str, details["loc"]))
    problem = problem_of(f"growth.stages.0.{key}", details)
    return Problem(f"--{key}" if key else "", problem.message, problem.hint)


def growth_map(before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap:
    """What a planned growth makes of a model. Raises ConfigError when it does not fit the model."""
    known = operators()
    if planned.operator not in known:
        message = f"unknown operator '{planned.operator}'; known: {', '.join(known)}"
        raise ConfigError([Problem("--operator", message, suggestion(planned.operator, known))])
    check_planned("", planned, known[planned.operator], found := Findings())
    found.raise_if_any()
    growth = known[planned.operator].grow(before, planned)
    if isinstance(growth, str):
        raise ConfigError([Problem("--operator", f"{planned.operator}: {growth}")])
    return growth
