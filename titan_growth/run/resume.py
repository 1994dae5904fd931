"""Resuming a run: what its first start decided, and which changes of the recipe are allowed.

What the recipe left open was decided at the first start (a drawn seed, a derived batch size) and stays. Changes that
would make it another run are refused; all others are printed and take effect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import Lineage
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.loader import with_values
from titan_growth.config.schema.recipe import Recipe, TrainingConfig
from titan_growth.growth.chain import chain_of
from titan_growth.growth.schedule import GrowthPlan
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.run.fresh import earlier_recipe
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.rotary import KEY as ROPE_KEY
from titan_growth.run.rotary import is_left_open
from titan_growth.run.vet import recipe_of
from titan_growth.tools.errors import CheckpointError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.logs import logger
from titan_growth.tools.text import many

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
"""Sections whose changes are not printed: they change nothing, or are compared in another way."""

_REMARKABLE = ("model.converters",)
"""Exceptions: keys of those sections that do change the computation."""

_STILL_FREE = {"lr", "warmup_steps", "warmup", "parallelism", "num_ranks", "local_batch_size"}
"""Keys of a past growth that a resume may change: they concern the steps to come."""

ONLY_WEIGHTS_KEY = "checkpoint.last_save_model_only"
"""Key of the problem that a checkpoint without moments is no way to go on."""

_NEW_FOLDER = "Name another job.dump_folder to start a new run"


def decided_before(folder: Path, checkpoint: StepFolder | None) -> Recipe | None:
    """The effective recipe of the run's earlier start, from its checkpoint or else from its folder.

    Raises:
        CheckpointError: when the checkpoint's recipe cannot be read.
    """
    if checkpoint is not None:
        return recipe_of(checkpoint)
    try:
        return earlier_recipe(folder)
    except ValueError as error:
        logger.warning("%s: what it left open, such as the seed, is decided anew", error)
        return None


def compare(checkpoint: StepFolder, recipe: Recipe) -> tuple[list[Problem], list[str]]:
    """(changes that are refused, a line for each that takes effect) between a checkpoint and the present recipe.

    Both recipes are effective ones, with seed and batch size resolved.
    """
    before, name, done = recipe_of(checkpoint), checkpoint.path.name, num_growths_of(checkpoint)
    found = Findings()
    old, new = (dict(_flat(each.model_dump())) for each in (before, recipe))
    keys = sorted(old.keys() | new.keys())
    # A list that was or becomes empty is told by its items.
    changed = [
        key for key in keys if old.get(key) != new.get(key) and not any(one.startswith(f"{key}.") for one in keys)
    ]
    old_model, new_model = (model_config_of(each.model, Findings()) for each in (before, recipe))
    fixed = {key: (old.get(key), new.get(key)) for key in _FIXED if key in changed}
    if (before.model.name, old_model) != (recipe.model.name, new_model):
        fixed = {**_model_changes(old_model, new_model), **fixed}
    for key, (there, here) in fixed.items():
        found.problem(key, f"{name} was written with {_show(there)}, the recipe says {_show(here)}", _NEW_FOLDER)
    if _past(before, done) != _past(recipe, done):
        message = f"{name} has {many(done, 'growth')} behind it that the recipe changes"
        found.problem("growth.stages", message, _NEW_FOLDER)
    elif old_model == new_model and _model_then(before, done) != _model_then(recipe, done):
        message = (
            f"{name} has {checkpoint.manifest.num_layers} layers, from which the recipe's "
            f"{'growths that are left do' if done else 'growths do'} not lead to its model"
        )
        found.problem("growth.stages", message, _NEW_FOLDER)
    if _other_batches(before.training, recipe.training, checkpoint.step):
        message = f"is not what {name} was trained with up to step {checkpoint.step:,}"
        found.problem("training.batch_schedule", message, f"Change later entries only. {_NEW_FOLDER}")
    if checkpoint.manifest.model_only:
        message = f"{name} holds only weights, so the run cannot go on from it"
        hint = "Start a new run with checkpoint.initial_load_path, or resume an earlier checkpoint.load_step"
        found.problem(ONLY_WEIGHTS_KEY, message, hint)
    changes = [
        f"changed since {name}: {key} = {_show(new.get(key))} (was {_show(old.get(key))})"
        for key in changed
        if key not in _FIXED and (key in _REMARKABLE or not key.startswith(_UNREMARKABLE))
    ]
    if changes and (line := _learning_rate_change(checkpoint, before, recipe)):
        changes.append(line)
    return found.problems, changes


def as_decided(checkpoint: StepFolder, recipe: Recipe) -> Recipe:
    """A recipe with what it leaves open as the checkpoint's run has decided it."""
    before = recipe_of(checkpoint)
    values: dict[str, Any] = {}
    if recipe.debug.seed is None:
        values["debug.seed"] = before.debug.seed
    if recipe.training.global_batch_size == -1:
        values["training.global_batch_size"] = before.training.global_batch_size
    if recipe.training.mixed_precision_param == "auto":
        values["training.mixed_precision_param"] = before.training.mixed_precision_param
    if is_left_open(recipe.model):
        values[ROPE_KEY] = before.model.rope_scaling_factor
    return with_values(recipe, values)


def _learning_rate_change(checkpoint: StepFolder, before: Recipe, recipe: Recipe) -> str | None:
    """What changed keys make of the learning rate of the next step: a longer run is decayed anew from its start."""
    was, now = (
        LRSchedule(
            one.lr_scheduler,
            lr=one.optimizer.lr,
            steps=one.training.steps,
            growth=one.growth,
            measure=BatchSizes.measure_of(one.training, one.lr_scheduler, one.growth),
        )
        for one in (before, recipe)
    )
    step, grown_at = checkpoint.step, checkpoint.lineage().grown_at
    if step >= recipe.training.steps:
        return None
    goes_on = step < before.training.steps
    old, new = was(step + 1 if goes_on else step, grown_at), now(step + 1, grown_at)
    if math.isclose(old, new, rel_tol=1e-6):
        return None
    instead = f"instead of {old:.3e}" if goes_on else f"and was {old:.3e} at step {step:,}, the last one"
    return f"so the learning rate at step {step + 1:,} is {new:.3e}, {instead}"


def _other_batches(before: TrainingConfig, training: TrainingConfig, step: int) -> bool:
    """Whether a batch schedule changes the sizes up to a step: the learning rate counts what has been trained on."""
    if not (before.batch_schedule or training.batch_schedule):
        return False
    then, now = (
        [(size, start) for size, start, _ in BatchSizes.of(one).stretches() if start < step]
        for one in (before, training)
    )
    return then != now


def _model_changes(old: DecoderConfig | None, new: DecoderConfig | None) -> dict[str, tuple[Any, Any]]:
    """The sizes that differ. A family or flavor that this version no longer knows has none to compare."""
    before, now = (dict(_flat(asdict(model))) if model is not None else {} for model in (old, new))
    names = [name for name in before if before[name] != now.get(name)] or ["name"]
    return {f"model ({name})": (before.get(name), now.get(name)) for name in names}


def check_same_growths(path: Path, lineage: Lineage, growth: GrowthPlan) -> None:
    """Raises CheckpointError unless the growths behind another run's checkpoint are the recipe's first ones."""
    if len(lineage.events) > len(growth.planned):
        raise CheckpointError(f"{path}: has more growths behind it than the recipe has stages")
    for number, event in enumerate(lineage.events):
        stage, sizes = growth.planned[number], growth.chain.configs[number + 1].sizes
        if (event.operator, event.to_layers) != (stage.operator, sizes["n_layers"]):
            raise CheckpointError(
                f"{path}: its growth {number + 1} was '{event.operator}' to {event.to_layers} layers, the recipe's "
                f"is '{stage.operator}' to {sizes['n_layers']}. Set checkpoint.initial_load_model_only = true"
            )


def num_growths_of(checkpoint: StepFolder) -> int:
    """How often a checkpoint's run has grown. Raises CheckpointError when its lineage cannot be read."""
    return len(checkpoint.lineage().events)


def _past(recipe: Recipe, num_growths: int) -> list[dict[str, Any]]:
    """What is fixed about past growths; their learning rates and layouts may change."""
    stages = recipe.growth.active_stages[:num_growths]
    return [stage.model_dump(exclude=_STILL_FREE, exclude_defaults=True) for stage in stages]


def _model_then(recipe: Recipe, num_growths: int) -> DecoderConfig | None:
    """The model of a recipe after some of its growths; None where this version cannot make one of it."""
    unused = Findings()
    chain = chain_of(recipe.growth, model_config_of(recipe.model, unused), unused)
    return chain.configs[num_growths] if chain is not None and num_growths < len(chain.configs) else None


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; tables in lists are numbered."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _show(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
