"""Coming back to a run: what it had decided for itself, and what may have changed since.

A run folder resumes. Some of what the recipe left open was decided at the first start (a drawn seed, a derived batch
size) and must not be decided again; some changes would make the run another run and are refused; all others are printed
and take effect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tomli

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import Lineage
from titan_growth.config.loader import recipe_from_toml
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import chain_of
from titan_growth.growth.schedule import GrowthPlan
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.run.vet import recipe_of
from titan_growth.tools.errors import CheckpointError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.run_folder import RECIPE_FILE

_FIXED = (
    "training.seq_len",
    "training.dtype",
    "debug.seed",
    "data.bos",
    "data.eos",
    "data.document_mask",
    "data.shuffle",
    "data.validation_fraction",
    "optimizer.name",
)
"""Keys whose change makes it another run. The model is compared by its sizes, and the data by its content."""

_UNREMARKABLE = ("job.", "model.", "data.", "metrics.", "profiling.")
"""Sections whose changes are not worth a line: they change nothing, or are compared in another way."""

_REMARKABLE = ("model.converters",)
"""Keys of those sections that do change the computation."""


def decided_before(folder: Path, checkpoint: StepFolder | None) -> Recipe | None:
    """The effective recipe of the run's earlier start, from its checkpoint or else from its folder.

    Raises:
        CheckpointError: when the checkpoint's recipe cannot be read.
    """
    if checkpoint is not None:
        return recipe_of(checkpoint)
    try:
        return recipe_from_toml(tomli.loads((folder / RECIPE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def compare(checkpoint: StepFolder, recipe: Recipe) -> tuple[list[Problem], list[str]]:
    """(changes that are refused, lines about those that take effect) between a checkpoint and the present recipe.

    Both recipes are effective ones, with seed and batch size resolved.
    """
    before = recipe_of(checkpoint)
    refused: list[Problem] = []
    where = f"{checkpoint.path.name} was written with"
    unknown = Findings()  # the present recipe has been planned; of the other one, a family may be gone
    old_model = model_config_of(before.model, unknown)
    new_model = model_config_of(recipe.model, unknown)
    if (before.model.name, old_model) != (recipe.model.name, new_model):
        # A flavor that this version does not know any more has no sizes to compare.
        sizes = [vars(model) if model is not None else {} for model in (old_model, new_model)]
        names = [name for name in sizes[0] if sizes[0][name] != sizes[1].get(name)]
        for name in names or ["name"]:
            old, new = (table.get(name) for table in sizes)
            refused.append(
                Problem(f"model ({name})", f"{where} {_show(old)}, the recipe says {_show(new)}", _NEW_FOLDER)
            )
    old, new = _flat(before), _flat(recipe)
    for key in _FIXED:
        if old.get(key) != new.get(key):
            refused.append(
                Problem(key, f"{where} {_show(old.get(key))}, the recipe says {_show(new.get(key))}", _NEW_FOLDER)
            )
    done = num_growths_of(checkpoint)
    if _past(before, done) != _past(recipe, done):
        message = f"{checkpoint.path.name} has {done} growth{'s' if done > 1 else ''} behind it that the recipe changes"
        refused.append(Problem("growth.stages", message, _NEW_FOLDER))
    elif old_model == new_model and _model_then(before, done) != _model_then(recipe, done):
        message = (
            f"{checkpoint.path.name} has {checkpoint.manifest.num_layers} layers, from which the recipe's "
            f"{'growths that are left do' if done else 'growths do'} not lead to its model"
        )
        refused.append(Problem("growth.stages", message, _NEW_FOLDER))
    if checkpoint.manifest.model_only:
        refused.append(
            Problem(
                "checkpoint.last_save_model_only",
                f"{checkpoint.path.name} holds only weights, so the run cannot go on from it",
                "Start a new run with checkpoint.initial_load_path, or resume an earlier checkpoint.load_step",
            )
        )
    changes = [
        f"changed since {checkpoint.path.name}: {key} = {_show(new.get(key))} (was {_show(old.get(key))})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in _FIXED
        and (key in _REMARKABLE or not key.startswith(_UNREMARKABLE))
    ]
    return refused, changes


def check_same_growths(path: Path, lineage: Lineage, growth: GrowthPlan) -> None:
    """Raises CheckpointError when the growths behind another run's checkpoint are not the first ones of the recipe."""
    if len(lineage.events) > len(growth.planned):
        raise CheckpointError(f"{path}: has more growths behind it than the recipe has stages")
    for number, event in enumerate(lineage.events):
        stage, sizes = growth.planned[number], growth.config_after(number + 1).sizes
        if (event.operator, event.to_layers) != (stage.operator, sizes["n_layers"]):
            raise CheckpointError(
                f"{path}: its growth {number + 1} was '{event.operator}' to {event.to_layers} layers, the recipe's "
                f"is '{stage.operator}' to {sizes['n_layers']}. Set checkpoint.initial_load_model_only = true"
            )


_STILL_FREE = {"lr", "warmup_steps", "parallelism", "num_ranks", "local_batch_size"}
"""Keys of a growth that has happened which a resume may change: they are about the steps to come."""

_NEW_FOLDER = "Name another job.dump_folder to start a new run"


def num_growths_of(checkpoint: StepFolder) -> int:
    """How often a checkpoint's run has grown. Raises CheckpointError when its lineage cannot be read."""
    return len(checkpoint.lineage().events)


def _past(recipe: Recipe, num_growths: int) -> list[dict[str, Any]]:
    """What cannot be changed about growths that have happened; their learning rates and layouts still can."""
    stages = recipe.growth.active_stages[:num_growths]
    return [stage.model_dump(exclude=_STILL_FREE, exclude_defaults=True) for stage in stages]


def _model_then(recipe: Recipe, num_growths: int) -> DecoderConfig | None:
    """The model that a recipe has after so many growths."""
    unused = Findings()  # a stored recipe that makes no model any more is compared as None
    target = model_config_of(recipe.model, unused)
    chain = chain_of(recipe.growth, target, unused) if target is not None else None
    return chain.configs[num_growths] if chain is not None and num_growths < len(chain.configs) else None


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(table: dict[str, Any], prefix: str) -> None:
        for name, value in table.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                value = {str(index): item for index, item in enumerate(value)}
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    walk(recipe.model_dump(), "")
    return flat


def _show(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
