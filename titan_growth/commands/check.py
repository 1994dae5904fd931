"""Everything that can be found wrong before a process group exists: recipe, sizes, folder, data, checkpoint.

`python -m titan_growth check` and `run_train.sh` come here, in one process, with the number of ranks in WORLD_SIZE. The
corpus is prepared here too, so that its errors come as one message and the ranks find it ready.
"""

from __future__ import annotations

import os
from pathlib import Path

from titan_growth.checkpoint.folder import open_step, root_of
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.liveness.exit_report import NOTHING_TO_DO
from titan_growth.run.data import check_run_data, prepare_run_data
from titan_growth.run.plan import RunPlan, plan_run
from titan_growth.run.start import Finished, Site, dry_run_of, resolve
from titan_growth.run.vet import listing_problem
from titan_growth.tools.errors import CheckpointError, ConfigError, RunFolderError, TitanGrowthError
from titan_growth.tools.location import is_remote
from titan_growth.tools.logs import logger, say, setup_logging
from titan_growth.tools.run_folder import RunFolder

READ_BYTES = 2 << 30
"""The shards of a checkpoint up to this size are read here, before anything has started; those of a larger one are left
to the ranks, which divide the reading."""


def main(argv: list[str]) -> int:
    """Checks a recipe as the ranks will see it; returns 0, 2 or `NOTHING_TO_DO`."""
    setup_logging(0)
    try:
        return _check(argv)
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


def _check(argv: list[str]) -> int:
    recipe = _recipe(argv)
    folder = RunFolder(recipe.job.dump_folder)
    os.environ["TITAN_GROWTH_DUMP_FOLDER"] = str(folder.path)
    dry_run = recipe.comm.mode != "default"
    if not dry_run:
        _check_folder(folder, recipe)
    start = resolve(recipe, Site(folder, _num_ranks(), _device_type()), most_bytes=READ_BYTES)
    if isinstance(start, Finished):
        logger.info("%s", start.message)
        return NOTHING_TO_DO
    start.log()
    if not dry_run:
        _check_space(folder, start.plan)
        if start.checkpoint is None and recipe.checkpoint.enable and recipe.checkpoint.initial_load_path is not None:
            _check_initial(start.plan)
    run_data = prepare_run_data(recipe, start.plan.target.vocab_size, progress=True)
    check_run_data(run_data, recipe)
    start.require_same_data(run_data)
    return 0


def _recipe(argv: list[str]) -> Recipe:
    """The recipe of a command line.

    Raises:
        ConfigError: with the problems of the recipe itself, and those it has on this number of ranks besides.
    """
    recipe, problems, warnings = inspect_recipe(argv)
    if recipe is None:
        raise ConfigError(problems)
    recipe = dry_run_of(recipe)
    if problems:
        _, more, _ = plan_run(recipe, num_ranks=_num_ranks(), device_type=_device_type())
        known = {problem.key for problem in problems}
        raise ConfigError(problems + [problem for problem in more if problem.key not in known])
    for warning in warnings:
        logger.warning("%s", warning)
    return recipe


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


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


def _check_initial(plan: RunPlan) -> None:
    """`checkpoint.initial_load_path` holds nothing that should not be read, and the run's first model."""
    import torch

    from titan_growth.checkpoint.manager import misfits
    from titan_growth.models.registry import family_module
    from titan_growth.run.initial import initial_reader, initial_state, is_hugging_face

    initial = initial_state(plan.recipe.checkpoint, checksums=False)  # the ranks share that work
    path, lineage = initial.path, initial.lineage
    if len(lineage.events) > len(plan.growth.stages):
        raise CheckpointError(f"{path}: has more growths behind it than the recipe has stages")
    config = plan.growth.config_after(len(lineage.events))
    with torch.device("meta"):
        model = family_module(plan.recipe.model.name).Decoder(config, plan.recipe.training.seq_len)
    reader = initial_reader(path, plan.recipe.model.name, config)
    wanted = model.to(getattr(torch, plan.recipe.training.dtype)).state_dict()
    wrong = misfits(reader, wanted, casts=plan.recipe.checkpoint.initial_load_model_only)
    if wrong:
        raise CheckpointError(f"checkpoint.initial_load_path: {wrong[0]}. Name a checkpoint of this model")
    if is_hugging_face(path):
        return  # its files hold no archives, and have been looked into
    folder = open_step(path)
    if folder is not None and (problem := listing_problem(folder)):
        raise CheckpointError(f"{path.name} refused: {problem}")
    chunks = reader.chunks()
    reader.check_chunks(chunk for name in wanted for chunk in chunks.get(name, ()))


def _check_space(folder: RunFolder, plan: RunPlan) -> None:
    """One checkpoint fits."""
    section = plan.recipe.checkpoint
    if not section.enable or section.load_only or is_remote(root_of(section.folder, folder.path)):
        return
    num_bytes = (2 if plan.recipe.training.dtype == "bfloat16" else 4) * plan.target.num_params
    if section.last_save_model_only and section.interval >= plan.recipe.training.steps:
        folder.require_space(num_bytes, "a checkpoint (weights)")
    else:
        folder.require_space(3 * num_bytes, "a checkpoint (weights and moments)")


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
