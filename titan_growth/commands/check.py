"""Everything that can be found wrong before a process group exists: recipe, sizes, folder, data, checkpoint.

`python -m titan_growth check` and `run_train.sh` come here, in one process, with the number of ranks in WORLD_SIZE. The
corpus is prepared here too, so that its errors come as one message and the ranks find it ready.
"""

from __future__ import annotations

import os
from pathlib import Path

from titan_growth.checkpoint.folder import StepFolder, root_of
from titan_growth.commands.args import CommandLine
from titan_growth.config.loader import dry_run_of, inspect_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.layout.shards import ModelShards
from titan_growth.liveness.exit_report import DONE, NOTHING_TO_DO
from titan_growth.models.registry import family_module
from titan_growth.run.plan import RunPlan, plan_run
from titan_growth.tools.errors import ConfigError, Problem, RunFolderError, TitanGrowthError
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import is_remote
from titan_growth.tools.logs import logger, say, setup_logging
from titan_growth.tools.run_folder import RunFolder

READ_BYTES = 2 << 30
"""A checkpoint on a disk is read in full here up to this size, before anything has started. A larger one, or one in a
store, is left to the ranks, which divide the reading."""


def command_line() -> CommandLine:
    """The arguments of `check`."""
    line = CommandLine(
        "check",
        """Checks a recipe as the ranks will see it, and prepares its data, without training: recipe, sizes, run folder,
        checkpoint, corpus. The environment variable WORLD_SIZE is the number of ranks (default: 1).""",
        example="--job.config_file train_configs/debug_model.toml",
        statuses="0 a run can start, or is finished already, 2 problems",
        recipe=True,
    )
    line.switch("--rehash", "Read corpora, prepared data and initial weights in full, to see whether any has changed.")
    return line


def main(argv: list[str]) -> int:
    """Checks a recipe as the ranks will see it; returns 0 or 2."""
    status = preflight(argv, launching=False)
    return DONE if status == NOTHING_TO_DO else status


def preflight(argv: list[str], *, launching: bool = True) -> int:
    """The same for the launcher, which must know when there is nothing to start.

    Args:
        launching: of a finished run, do not look at the data: nothing will read it.

    Returns:
        0, 2, or `NOTHING_TO_DO`.
    """
    line = command_line()
    if line.prints_help(argv):
        return 0
    setup_logging(0)
    try:
        args = line.read(argv)
        return _check(args.recipe, args.rehash, launching=launching)
    except ConfigError as error:
        report_problems(error)
        return error.exit_status
    except TitanGrowthError as error:
        say(f"error: {error}")
        return ConfigError.exit_status  # whatever it is: nothing has been started, and trying again would not help


def report_problems(error: ConfigError) -> None:
    """Prints a recipe's problems, one a line."""
    for problem in error.problems:
        say(f"error: {problem}")
    count = len(error.problems)
    say(
        f"{count} problem{'s' if count > 1 else ''}; nothing was started. "
        "python -m titan_growth train --help lists every key"
    )


def _check(argv: list[str], rehash: bool, *, launching: bool) -> int:
    # Not at the top: a typo in a recipe need not wait for torch.
    from titan_growth.models.registry import vocab_size_of
    from titan_growth.run.data import RunData, prepare_run_data
    from titan_growth.run.initial import check_initial
    from titan_growth.run.precision import slow_precision
    from titan_growth.run.start import Finished, Site, is_finished, require_same_data, resolve
    from titan_growth.tools.device import present_device_type

    recipe = _recipe(argv)
    folder = RunFolder(recipe.job.dump_folder)
    os.environ["TITAN_GROWTH_DUMP_FOLDER"] = str(folder.path)
    dry_run = recipe.comm.mode != "default"
    if not dry_run:
        _check_folder(folder, recipe)
    site = Site(folder, _num_ranks(), present_device_type())

    def reads_shards(checkpoint: StepFolder, now: Recipe) -> bool:
        is_small = checkpoint.num_bytes <= READ_BYTES and not is_remote(checkpoint.path)
        return is_small or is_finished(now, checkpoint)  # when a run is finished, nobody looks at it again

    def prepared() -> RunData:
        return prepare_run_data(recipe, vocab_size_of(recipe.model), progress=True, rehash=rehash)

    start = resolve(recipe, site, reads_shards)
    if isinstance(start, Finished):
        if rehash or not launching:
            require_same_data(start.checkpoint, prepared())
        _say_if_read(rehash, start.checkpoint)
        logger.info("%s", start.message)
        return NOTHING_TO_DO
    start.log()
    if slow := slow_precision(start.plan.recipe.training, start.site.device_type, start.precision):
        logger.warning("%s", slow)
    if not dry_run:
        _check_space(folder, start.plan)
        if start.checkpoint is None and recipe.checkpoint.enable and recipe.checkpoint.initial_load_path is not None:
            check_initial(start.plan)
    require_same_data(start.checkpoint, prepared())
    _say_if_read(rehash, start.checkpoint)
    return 0


def _say_if_read(rehash: bool, checkpoint: StepFolder | None) -> None:
    if rehash:
        same = "" if checkpoint is None else f": they are those that {checkpoint.path.name} was trained with"
        logger.info("corpora, prepared data and initial weights were read in full%s", same)


def _recipe(argv: list[str]) -> Recipe:
    """The recipe of a command line.

    Raises:
        ConfigError: with the problems of the recipe itself, and those it has on this number of ranks besides.
    """
    from titan_growth.tools.device import present_device_type

    found = Findings()
    recipe = inspect_recipe(argv, found)
    if recipe is None:
        raise ConfigError(found.problems)
    recipe = dry_run_of(recipe)
    plan_run(recipe, planning := Findings(), num_ranks=_num_ranks(), device_type=present_device_type())
    if found.problems:
        found.add_problems_of_other_keys(planning)
        raise ConfigError(found.problems)
    for warning in found.warnings:
        logger.warning("%s", warning)
    return recipe


def _num_ranks() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError([Problem("WORLD_SIZE", f"expected a number of ranks, at least 1, got '{text}'")])
    return int(text)


def _check_folder(folder: RunFolder, recipe: Recipe) -> None:
    """The run's folder can be made, written and locked, and nothing stands where its checkpoints belong."""
    folder.create()
    if os.environ.get("NODE_RANK", "0") == "0":
        # On one machine only: those that share the folder would find each other's lock.
        folder.lock()
        folder.unlock()
    if not recipe.checkpoint.enable:
        return
    root = root_of(recipe.checkpoint.folder, folder.path)
    if root.exists() and not root.is_dir():
        raise RunFolderError(f"checkpoint.folder: {root} is a file. Remove it, or name another folder")
    if is_remote(root) and not recipe.checkpoint.load_only:
        _try_writing(root)


def _try_writing(root: Path) -> None:
    """Leaves and removes a small file where checkpoints go. Stores have errors of many kinds."""
    probe = root / f".probe-{os.uname().nodename}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunFolderError(
            f"checkpoint.folder {root}: cannot be written to ({reason}). Give this machine the right to, or change it"
        ) from None


def _check_space(folder: RunFolder, plan: RunPlan) -> None:
    """One checkpoint fits."""
    section = plan.recipe.checkpoint
    if not section.enable or section.load_only or is_remote(root_of(section.folder, folder.path)):
        return
    size = 2 if plan.recipe.training.dtype == "bfloat16" else 4
    shards = ModelShards(plan.target, family_module(plan.recipe.model.name), MeshShape())
    if section.last_save_model_only and section.interval >= plan.recipe.training.steps:
        folder.require_space(size * shards.num_stored, "a checkpoint (weights)")
    else:
        num_moments = shards.moments(plan.recipe.optimizer).num_stored
        folder.require_space(size * (shards.num_stored + num_moments), "a checkpoint (weights and moments)")
