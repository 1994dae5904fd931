"""From a recipe to a run that can start: what is open gets decided, what is wrong gets reported, and all at once.

Shared by the preflight (one process, before torchrun) and by every rank, so both come to the same plan.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from titan_growth.checkpoint.folder import StepFolder, committed_steps, root_of
from titan_growth.config.loader import with_values
from titan_growth.config.schema.recipe import Recipe
from titan_growth.run.plan import RunPlan, plan_run
from titan_growth.run.resume import compare, decided_before, num_growths_of
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.files import write_atomic
from titan_growth.tools.logs import logger
from titan_growth.tools.run_folder import RunFolder

GONE_BACK_FILE = "gone-back-to"
"""In the checkpoint folder: the `load_step` that the run has gone back to."""


@dataclass(frozen=True)
class Decisions:
    """What a recipe left open and a run has decided."""

    seed: int
    global_batch_size: int | None


def dry_run_of(recipe: Recipe) -> Recipe:
    """The recipe of a dry run (`comm.mode`): one step, which leaves nothing behind; any other recipe as it is."""
    if recipe.comm.mode == "default":
        return recipe
    sections = ("checkpoint", "growth", "validation")
    off: dict[str, object] = {f"{section}.enable": False for section in sections}
    return with_values(recipe, {**off, "training.steps": 1, "metrics.enable_tensorboard": False})


def decide(recipe: Recipe, folder: RunFolder, checkpoint: StepFolder | None) -> Decisions:
    """Seed and batch size of the run: the recipe's, else those of its earlier start, else new ones.

    Raises:
        ConfigError: when the run has checkpoints, but not where the recipe now says: it would start from scratch.
    """
    before = decided_before(folder.path, checkpoint)
    if checkpoint is None and before is not None and recipe.checkpoint.enable:
        _require_not_left(before, recipe, folder)
    seed = recipe.debug.seed
    if seed is None:
        seed = before.debug.seed if before is not None else None
    if seed is None:
        seed = secrets.randbelow(2**31)
    return Decisions(seed, before.training.global_batch_size if before is not None else None)


def _require_not_left(before: Recipe, recipe: Recipe, folder: RunFolder) -> None:
    if not before.checkpoint.enable or before.checkpoint.folder == recipe.checkpoint.folder:
        return
    left, _ = committed_steps(root_of(before.checkpoint.folder, folder.path))
    if left:
        message = (
            f"there is no checkpoint in {root_of(recipe.checkpoint.folder, folder.path)}, but this run has some in "
            f"{left[0].path.parent}, up to {left[0].path.name}"
        )
        hint = "Name that folder, or copy the newest here; another job.dump_folder starts a new run"
        raise ConfigError([Problem("checkpoint.folder", message, hint)])


def settle(
    recipe: Recipe, decisions: Decisions, checkpoint: StepFolder | None, *, num_ranks: int, device_type: str
) -> RunPlan:
    """The plan of a run, checked against the checkpoint it goes on from.

    Raises:
        ConfigError: with every problem of the recipe, or every change that the checkpoint does not allow.
    """
    recipe = with_values(recipe, {"debug.seed": decisions.seed})
    before = decisions.global_batch_size
    plan, problems, warnings = plan_run(
        recipe,
        num_ranks=num_ranks,
        device_type=device_type,
        global_batch_size=before if before != -1 else None,
        progress=checkpoint.manifest.progress if checkpoint is not None else None,
        num_growths=num_growths_of(checkpoint) if checkpoint is not None else 0,
        grows_at_once=checkpoint is not None and checkpoint.manifest.held_out_loss is not None,
    )
    if plan is None:
        raise ConfigError(problems)
    for warning in warnings:
        logger.warning("%s", warning)
    if checkpoint is not None:
        refused, changes = compare(checkpoint, plan.recipe)
        if refused:
            raise ConfigError(refused)
        for line in changes:
            logger.info("%s", line)
    return plan


def going_back(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe as it is to be read now: a `checkpoint.load_step` that has been gone back to is done with.

    The same command must go on, not go back, when it is given again after a stop; naming another step, or none in
    between, goes back again.
    """
    wanted = recipe.checkpoint.load_step
    if wanted == -1:
        return recipe
    try:
        done = int((root_of(recipe.checkpoint.folder, folder.path) / GONE_BACK_FILE).read_text())
    except (OSError, ValueError):
        done = -1
    return with_values(recipe, {"checkpoint.load_step": -1}) if done == wanted else recipe


def note_going_back(recipe: Recipe, folder: RunFolder) -> None:
    """Remembers which `load_step` has been gone back to, or forgets it when the recipe names none."""
    root = root_of(recipe.checkpoint.folder, folder.path)
    if recipe.checkpoint.load_step != -1:
        write_atomic(root / GONE_BACK_FILE, f"{recipe.checkpoint.load_step}\n")
    else:
        (root / GONE_BACK_FILE).unlink(missing_ok=True)


def finished(recipe: Recipe, checkpoint: StepFolder | None) -> bool:
    """Whether a run that would go on from this checkpoint has nothing left to do."""
    if recipe.checkpoint.load_step != -1:
        return False  # the user goes back on purpose
    if checkpoint is None or checkpoint.step < recipe.training.steps:
        return False
    # A run that ended before one of its growths came is not finished, and says so again.
    return num_growths_of(checkpoint) >= len(recipe.growth.active_stages)


def finished_message(checkpoint: StepFolder) -> str:
    """What to say then."""
    return (
        f"nothing to do: this run is finished at step {checkpoint.step} ({checkpoint.path}). "
        "Raise training.steps to go on, or name another job.dump_folder"
    )
