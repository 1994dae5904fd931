"""Growths given on a command line (`grow`, `probe`): their words, and the checkpoint that they start from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from titan_growth.checkpoint.folder import LINEAGE, RECIPE, StepFolder, open_step
from titan_growth.checkpoint.history import Lineage
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.fields import parse_text, suggestion
from titan_growth.config.plugins import PLUGINS_KEY
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import Chain, stage_problems
from titan_growth.growth.operators.base import GrowthMap, operators
from titan_growth.models.config import DecoderConfig
from titan_growth.run.vet import history_of, problem_of, whole_problem
from titan_growth.tools.errors import ConfigError, Problem, RefusedCheckpointError, one_line

STAGE_WORDS = ("operator", "factor", "layer_map", "n_layers", "dim", "n_heads", "n_kv_heads", "hidden_dim", "noise",
               "optimizer_state", "optimizer_step", "options")  # fmt: skip
"""The settings of a stage that mean something without a run."""


@dataclass(frozen=True)
class Source:
    """A committed checkpoint of ours, ready to be grown."""

    folder: StepFolder
    recipe: Recipe
    """What it was written with."""
    chain: Chain
    lineage: Lineage

    @property
    def config(self) -> DecoderConfig:
        """The model that it holds."""
        return self.chain.configs[len(self.lineage.events)]

    def reader(self) -> SafeReader:
        """Of its tensors."""
        return SafeReader(self.folder.path)


def open_source(path: Path, plugins: Sequence[str] = ()) -> Source:
    """A step folder, checked in full.

    Args:
        plugins: that have been loaded. What a stored recipe names is not imported for that alone.

    Raises:
        ConfigError: when it is not there, or its recipe needs plugins that have not been loaded.
        CheckpointError: when it was never committed, is damaged, or cannot be grown from at this step.
    """
    if not path.is_dir():
        raise ConfigError([Problem("--from", f"{path}: no such folder", "Name a step-N folder")])
    folder = open_step(path)
    if folder is None:
        raise RefusedCheckpointError(str(path), "it has no manifest, so it was never committed")
    if damage := folder.damage(checksums=True, names=(RECIPE, LINEAGE)):
        raise folder.refused(damage)
    if missing := [name for name in _plugins_of(folder) if name not in plugins]:
        message = f"{path} was written with plugins, and its recipe means nothing without them"
        raise ConfigError([Problem("--plugins", message, f"If you trust them, give --plugins {','.join(missing)}")])
    if damage := problem_of(folder) or whole_problem(folder):
        raise folder.refused(damage)
    recipe, chain, lineage = history_of(folder)
    if lineage.events:
        last = lineage.events[-1]
        mask_steps = last.stage.get("mask_steps")
        if folder.step < last.step + (mask_steps if isinstance(mask_steps, int) else 0):
            raise folder.refused("the mask of its last growth is still opening. Take a later step")
    return Source(folder, recipe, chain, lineage)


def _plugins_of(folder: StepFolder) -> list[str]:
    """The modules that a checkpoint's recipe names."""
    named = folder.recipe_table().get(PLUGINS_KEY, [])
    if not isinstance(named, list) or not all(isinstance(name, str) and len(name) < 200 for name in named):
        raise folder.refused("its recipe cannot be read (plugins are no list of names)")
    return [one_line(name) for name in named]


def parse_words(argv: Sequence[str], known: Collection[str], *, command: str) -> dict[str, list[str]]:
    """Name -> values, in their order, of `--some-name value` and `--some_name=value`.

    Raises:
        ConfigError: for words that are no arguments of the command, or have no value.
    """
    given: dict[str, list[str]] = {}
    words = iter(argv)
    problems = []
    for word in words:
        name, has_value, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in known:
            hint = suggestion(name, tuple(known)) or f"python -m titan_growth {command} --help lists the arguments"
            problems.append(Problem(word, "is no argument of this command", hint))
            continue
        value = text if has_value else next(words, None)
        if value is None or value.startswith("--"):
            problems.append(Problem(word, "needs a value"))
            break
        given.setdefault(name, []).append(value)
    if problems:
        raise ConfigError(problems)
    return given


def stage_of(words: Mapping[str, str], **defaults: Any) -> PlannedGrowth:
    """The stage that words of a command line, all known, make up.

    Args:
        defaults: values of settings that the words do not give.

    Raises:
        ConfigError: for values that a stage does not take.
    """
    fields = PlannedGrowth.model_fields
    settings = {name: parse_text(text, fields[name].annotation) for name, text in words.items()}
    if "options" in settings:
        with contextlib.suppress(ValueError):
            settings["options"] = json.loads(words["options"])
    return checked_stage({**defaults, **settings})


def checked_stage(settings: Mapping[str, Any]) -> PlannedGrowth:
    """A stage of settings; when it happens is left to the caller. Raises ConfigError for values it does not take."""
    try:
        return PlannedGrowth.model_validate({"at": "1 step", **settings})
    except ValidationError as error:
        raise ConfigError(
            [Problem("--" + ".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
        ) from None


def map_of(before: DecoderConfig, stage: PlannedGrowth) -> GrowthMap:
    """What a stage makes of a model. Raises ConfigError when it does not fit the model."""
    known = operators()
    if stage.operator not in known:
        message = f"unknown operator '{stage.operator}'; known: {', '.join(known)}"
        raise ConfigError([Problem("--operator", message, suggestion(stage.operator, known))])
    if problems := list(stage_problems("", stage, known[stage.operator])):
        raise ConfigError(problems)
    growth = known[stage.operator].grow(before, stage)
    if isinstance(growth, str):
        raise ConfigError([Problem("--operator", f"{stage.operator}: {growth}")])
    return growth
