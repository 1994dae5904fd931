"""`python -m titan_growth branch`: the recipe of a cool-down that starts from a checkpoint of a run's stable phase.

Under warmup-stable-decay a run can be annealed from any step of its stable phase, and one long run gives many annealed
ends. A branch is a run of its own, in a folder of its own: it takes over weights, moments, counters and data cursor.
Its learning rate falls from the stable value to the floor over its steps. The parent is only read.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_growth.checkpoint.folder import StepFolder, open_step, root_of
from titan_growth.checkpoint.steps import committed_steps
from titan_growth.commands.args import CommandLine, positive
from titan_growth.commands.growth_args import first_model_keys, learning_rate_keys, model_keys, schedule_of
from titan_growth.commands.source import committed
from titan_growth.commands.target import require_new
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.checks import check_recipe
from titan_growth.config.loader import to_toml, with_values
from titan_growth.config.plugins import load_plugins, require_plugins
from titan_growth.config.schema.recipe import Recipe
from titan_growth.run.fresh import earlier_recipe
from titan_growth.run.phases import recipe_in_phase
from titan_growth.run.vet import History, history_of, plugins_of, problem_of
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, RefusedCheckpointError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import folder_at, is_remote
from titan_growth.tools.text import many

RECIPE_NAME = "branch.toml"
"""The recipe's file, in the new run's folder."""

_LINE = CommandLine(
    "branch",
    """Writes the recipe of a cool-down from a checkpoint of a run's stable phase: a run of its own, which goes on with
    the checkpoint's weights, moments, counters and data while the learning rate falls to its floor. run_train.sh starts
    it. Growths that are still to come in the parent are left out.""",
    example="--from outputs/checkpoint/step-5000 --steps 500 --to outputs/cool-down-5000",
    statuses="0 written, 1 no checkpoint to branch from, 2 wrong arguments",
)
_FROM = "A committed step folder, or the dump folder of a run: its newest step that can be branched from."
_LINE.option("--from", "FOLDER", _FROM, required=True, dest="source")
_LINE.option("--steps", "N", "Steps of the cool-down.", positive, required=True)
_TO = "Dump folder of the new run, empty or not there. (default: the parent's, with the step and --steps added)"
_LINE.option("--to", "FOLDER", _TO, dest="target")
_LINE.plugins()


@_LINE.command
def main(args: Namespace) -> int:
    """Writes the recipe; returns the exit status."""
    load_plugins(args.plugins)
    source = folder_at(args.source)
    folder, history = _stable_step(source)
    step = folder.step
    beside = f"{history.recipe.job.dump_folder.rstrip('/')}-step-{step}-cool-down-{args.steps}"
    target = Path(args.target or beside)
    for parent in _folders_of_parent(folder):
        require_new(target, parent)
    recipe = branch_recipe(folder, history, args.steps, target, plugins=args.plugins)
    path = target / RECIPE_NAME
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_toml(recipe))
    except OSError as error:
        raise ConfigError([Problem("--to", f"{target} cannot be written ({error.strerror or error})")]) from None
    schedule = schedule_of(recipe)
    rates = [schedule(one, history.lineage.grown_at) for one in (step + 1, step + args.steps)]
    print(
        f"{path}: {many(args.steps, 'step')} from step {step:,} ({folder.manifest.progress.tokens:,} tokens) of "
        f"{folder.path}, learning rate {rates[0]:.3e} to {rates[1]:.3e}"
        f"\nstart it with: ./run_train.sh --job.config_file {path}"
    )
    return 0


def _stable_step(source: Path) -> tuple[StepFolder, History]:
    """The checkpoint that `--from` names, with its history.

    Raises:
        ConfigError: when there is no such folder.
        CheckpointError: when it holds no checkpoint that can be branched from.
    """
    if not source.is_dir():
        raise ConfigError([Problem("--from", f"{source}: no such folder", "Name a step-N folder, or a dump folder")])
    if open_step(source) is not None:
        folder = committed(source)
        return folder, _branchable(folder)
    try:
        recipe = earlier_recipe(source)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}. Name a step-N folder") from None
    if recipe is None:
        raise CheckpointError(f"{source}: neither a committed step folder nor a run's folder. Name a step-N folder")
    refused: list[RefusedCheckpointError] = []
    for folder in committed_steps(root_of(recipe.checkpoint.folder, source)).usable:
        try:
            return folder, _branchable(folder)
        except RefusedCheckpointError as error:
            refused.append(error)
    if refused:
        raise refused[0]
    raise CheckpointError(f"{source}: this run has no checkpoint. Name a step-N folder")


def _branchable(folder: StepFolder) -> History:
    """The history of a checkpoint. Raises RefusedCheckpointError unless a cool-down can start from it."""
    require_plugins(plugins_of(folder), str(folder.path))
    if damage := problem_of(folder):
        raise folder.refused(damage)
    history = history_of(folder)
    if folder.manifest.model_only:
        raise folder.refused("it holds only weights, and a cool-down needs the moments too. Take an earlier step")
    schedule, grown_at = schedule_of(history.recipe), history.lineage.grown_at
    segment = schedule.segment(max(folder.step, 1), grown_at)
    stable = schedule.stable_steps(segment)
    if stable <= segment.warmup_steps:
        reason = "its learning rate has no stable phase: the decay follows the warmup"
        raise folder.refused(f"{reason}. Train with an lr_scheduler.decay_ratio or decay that leaves room for one")
    stands = schedule.stands(folder.step, grown_at)
    if stands == "warmup":
        raise folder.refused("its learning rate is still warming up. Take a later step")
    if stands == "decay":
        last = segment.start + stable
        raise folder.refused(f"its learning rate is already decaying. Take step {last:,} or an earlier one")
    return history


def _folders_of_parent(folder: StepFolder) -> list[Path]:
    """The folders in which nothing may be written; a copied step folder lies in no run's."""
    around = [parent for parent in folder.path.parents[:2] if (parent / "recipe.toml").is_file()]
    return [folder.path, *around]


def branch_recipe(
    folder: StepFolder, history: History, steps: int, target: Path, *, plugins: Sequence[str] = ()
) -> Recipe:
    """The recipe of a cool-down of some steps: the parent's, with the growths behind the checkpoint and no others.

    Args:
        target: dump folder of the new run.
        plugins: those loaded besides the recipe's.

    Raises:
        ConfigError: when the parent's recipe does not lead to such a run.
    """
    recipe, step, events = history.recipe, folder.step, history.lineage.events
    now = recipe_in_phase(recipe, len(events))
    # Layouts of the past are gone: the present one holds from the start.
    moved = {"parallelism": None, "num_ranks": None, "local_batch_size": None, "global_batch_size": None}
    stages = [
        planned.model_copy(update={**moved, "at": f"{event.step} steps"})
        for planned, event in zip(recipe.growth.active_stages, events, strict=False)
    ]
    base = history.chain.configs[0]
    entries = zip(recipe.training.batch_schedule, BatchSizes.of(recipe.training).starts[1:], strict=True)
    schedule = [entry for entry, start in entries if start <= step]
    values: dict[str, Any] = {
        "plugins": sorted({*recipe.plugins, *plugins}),
        "job.dump_folder": str(target),
        "job.description": f"cool-down of {many(steps, 'step')} from step {step} of: {recipe.job.description}",
        **model_keys(history.config),
        "parallelism": now.parallelism.model_dump(),
        "training.local_batch_size": now.training.local_batch_size,
        "training.global_batch_size": now.training.global_batch_size,
        "training.batch_schedule": [entry.model_dump() for entry in schedule],
        "training.steps": step + steps,
        **learning_rate_keys(recipe, grows=bool(stages)),
        "lr_scheduler.total_steps": None,
        "lr_scheduler.total": None,
        "lr_scheduler.decay_ratio": None,
        "lr_scheduler.decay": many(steps, "step"),
        "growth.enable": bool(stages),
        "growth.stages": [stage.model_dump(exclude_none=True) for stage in stages],
        **(first_model_keys(base) if stages else {}),
        "growth.watchdog": {"steps": 0} if stages else {},
        **_checkpoint_keys(recipe, folder),
    }
    made = with_values(recipe, values)
    check_recipe(made, found := Findings())
    found.raise_if_any()
    return made


def _checkpoint_keys(recipe: Recipe, folder: StepFolder) -> dict[str, Any]:
    """Keys that start a new run from all state of a checkpoint, with checkpoints of its own."""
    path = folder.path if is_remote(folder.path) else folder.path.resolve()
    keys: dict[str, Any] = {
        "enable": True,
        "load_only": False,
        "load_step": -1,
        "start_fresh": False,
        "initial_load_path": str(path),
        "initial_load_model_only": False,
        "initial_load_in_hf": False,
    }
    if is_remote(recipe.checkpoint.folder):
        keys["folder"] = "checkpoint"  # the URL is the parent's
    return {f"checkpoint.{key}": value for key, value in keys.items()}
