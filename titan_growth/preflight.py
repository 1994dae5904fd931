"""Everything that can be found wrong before a process group exists: recipe, sizes, folder, data, checkpoint.

`python -m titan_growth check` and `run_train.sh` come here, in one process, with the number of ranks in WORLD_SIZE. The
corpus is prepared here too, so that its errors come as one message and the ranks find it ready.
"""

from __future__ import annotations

import os
import sys

from titan_growth.config.loader import inspect_recipe
from titan_growth.tools.errors import ConfigError, Problem, TitanGrowthError
from titan_growth.tools.logs import logger, setup_logging
from titan_growth.tools.run_folder import RunFolder

FINISHED = 10
"""Status for a run that has nothing left to do."""


def main(argv: list[str]) -> int:
    """Checks a recipe as the ranks will see it; returns 0, 1, 2 or `FINISHED`."""
    setup_logging(0)
    try:
        return _check(argv)
    except ConfigError as error:
        report_problems(error)
        return error.exit_status
    except TitanGrowthError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def report_problems(error: ConfigError) -> None:
    """Prints a recipe's problems, one a line."""
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    count = len(error.problems)
    print(
        f"{count} problem{'s' if count > 1 else ''}; nothing was started. "
        "python -m titan_growth train --help lists every key",
        file=sys.stderr,
    )


def _check(argv: list[str]) -> int:
    recipe, problems, warnings = inspect_recipe(argv)
    if recipe is None:
        raise ConfigError(problems)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    # torch is needed for the device and the data; a recipe that is already known to be wrong is still looked through.
    from titan_growth.plan import plan_run
    from titan_growth.start import decide, dry_run_of, finished, finished_message, settle

    device_type = _device_type()
    recipe = dry_run_of(recipe)
    _, more, _ = plan_run(recipe, num_ranks=num_ranks, device_type=device_type)
    known = {problem.key for problem in problems}
    if problems:
        raise ConfigError(problems + [problem for problem in more if problem.key not in known])

    folder = RunFolder(recipe.job.dump_folder)
    os.environ["TITAN_GROWTH_DUMP_FOLDER"] = str(folder.path)
    if recipe.comm.mode != "default":
        if more:
            raise ConfigError(more)
    else:
        if (done := finished(recipe, folder)) is not None:
            logger.info("%s", finished_message(done))
            return FINISHED
        _check_resume(recipe, folder, num_ranks, device_type, more)
    for warning in warnings:
        logger.warning("%s", warning)
    decisions = decide(recipe, folder, None)
    plan = settle(recipe, decisions, None, num_ranks=num_ranks, device_type=device_type)
    if recipe.comm.mode == "default":
        _check_folder(folder, plan)

    from titan_growth.run_data import check_run_data, prepare_run_data

    run_data = prepare_run_data(recipe, plan.target.vocab_size, progress=True)
    check_run_data(run_data, recipe)
    return 0


def _check_resume(recipe, folder, num_ranks, device_type, more) -> None:  # type: ignore[no-untyped-def]
    """A checkpoint that does not belong to the recipe is refused here; the ranks check its files besides."""
    from titan_growth.resume import newest_checkpoint
    from titan_growth.start import decide, settle

    checkpoint = newest_checkpoint(recipe, folder.path)
    decisions = decide(recipe, folder, checkpoint)
    if checkpoint is not None:
        settle(recipe, decisions, checkpoint, num_ranks=num_ranks, device_type=device_type)
    elif recipe.checkpoint.enable and recipe.checkpoint.load_step != -1:
        root = folder.path / recipe.checkpoint.folder
        message = f"there is no usable step-{recipe.checkpoint.load_step} in {root}"
        raise ConfigError([Problem("checkpoint.load_step", message), *more])
    elif recipe.checkpoint.enable and recipe.checkpoint.initial_load_path is not None:
        from titan_growth.checkpoint.initial import initial_state

        initial_state(recipe.checkpoint)


def _check_folder(folder, plan) -> None:  # type: ignore[no-untyped-def]
    """The run's folder can be made, written, locked, and holds one checkpoint."""
    folder.create()
    folder.lock()
    folder.unlock()
    if plan.recipe.checkpoint.enable and not plan.recipe.checkpoint.load_only:
        bytes_per_value = 2 if plan.recipe.training.dtype == "bfloat16" else 4
        folder.require_space(3 * bytes_per_value * plan.target.num_params, "a checkpoint (weights and moments)")


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
