"""The entry of every rank: `torchrun ... -m titan_growth.train --job.config_file FILE --section.key value`.

Parses, starts the process group, trains and reports the outcome: a message, not a traceback, for what a user can
cause, and an exit report for `run_train.sh`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Sequence

from titan_growth.tools.packages import require_core

if __name__ == "__main__":
    require_core()  # the imports below fail without

from titan_growth.commands.check import report_problems
from titan_growth.config.fields import section_names
from titan_growth.config.help import help_text
from titan_growth.config.loader import dry_run_of, load_recipe, to_toml
from titan_growth.config.plugins import recipe_class
from titan_growth.config.schema.recipe import CommConfig, DebugConfig, Recipe
from titan_growth.config.sources import load_named_plugins
from titan_growth.liveness.exit_report import (
    BAD_RECIPE,
    DONE,
    FAILED,
    REQUEUE,
    RESIZE,
    ExitReport,
    Outcome,
    caused_by_peer,
    lost_worker,
    process_status,
    stop_watching_workers,
)
from titan_growth.liveness.hang import end_processes
from titan_growth.tools.errors import ConfigError, TitanGrowthError
from titan_growth.tools.logs import say, setup_logging
from titan_growth.tools.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Runs this rank to its end and returns the process's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        return _help(argv)
    setup_logging()
    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe = load_recipe(argv)
    except ConfigError as error:
        if rank == 0:
            report_problems(error)
        return error.exit_status
    folder = RunFolder(recipe.job.dump_folder)
    report = ExitReport(folder.path, rank)
    secondary, hanging = False, ()
    try:
        outcome = run(recipe, folder, report)
        if outcome.message and rank == 0:
            say(outcome.message if outcome.status in (DONE, REQUEUE, RESIZE) else f"error: {outcome.message}")
    except ConfigError as error:
        outcome = Outcome(error.exit_status, str(error))
        report_problems(error)
    except TitanGrowthError as error:
        outcome = Outcome(error.exit_status, str(error))
        secondary, hanging = getattr(error, "secondary", False), getattr(error, "pids", ())
        say(f"error: {error}")
    except Exception as error:
        secondary = caused_by_peer(error)
        outcome = _unexpected(error, rank, lost_peer=secondary)
    return _leave(report, outcome, secondary, hanging)


def _help(argv: Sequence[str]) -> int:
    """Prints all keys of a recipe, or those of the section named after `--help`."""
    position = next(position for position, word in enumerate(argv) if word in ("--help", "-h"))
    section = argv[position + 1] if len(argv) > position + 1 and not argv[position + 1].startswith("-") else None
    try:
        load_named_plugins(list(argv))  # their tables belong to the help
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems))
        return BAD_RECIPE
    if section is not None and section not in recipe_class().model_fields:
        print(f"error: there is no section {section!r}; the sections are {', '.join(section_names(recipe_class()))}")
        return BAD_RECIPE
    with contextlib.suppress(BrokenPipeError):  # `--help | head`
        print(help_text(section), flush=True)
        return DONE
    os._exit(DONE)


def _unexpected(error: Exception, rank: int, *, lost_peer: bool) -> Outcome:
    """The outcome of a run that failed with an error no user can cause, or that lost another rank or a worker."""
    if lost_peer:
        reason: str | None = str(error).strip().split("\n")[0]
        message = f"rank {rank} lost another rank: {reason}. The last checkpoint is intact; run the command again"
        say(f"error: {message}")
    elif reason := lost_worker(error):
        message = (
            f"rank {rank}: a process that loads data is gone ({reason}). If memory is short, lower "
            "training.dataloader.num_workers. The last checkpoint is intact; run the command again"
        )
        say(f"error: {message}")
    else:
        message = f"rank {rank}: {type(error).__name__}: {error}"
        say(traceback.format_exc())
    return Outcome(FAILED, message)


def _leave(report: ExitReport, outcome: Outcome, secondary: bool, hanging: Sequence[int]) -> int:
    """Writes the exit report and returns the process's status; after a failure the process ends here."""
    report.write(outcome.status, outcome.message, num_ranks=outcome.num_ranks, secondary=secondary)
    end_processes(hanging)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if outcome.status not in (DONE, REQUEUE):
        # Skip interpreter shutdown: it would block in collectives no other rank joins.
        os._exit(process_status(outcome.status))
    return process_status(outcome.status)


def run(recipe: Recipe, folder: RunFolder, report: ExitReport) -> Outcome:
    """Trains a recipe on this rank, in a process group that it starts and ends."""
    import torch.distributed as dist

    from titan_growth.checkpoint.manager import CheckpointManager
    from titan_growth.liveness.heartbeat import Heartbeat, give_up
    from titan_growth.liveness.stop_signal import StopSignal
    from titan_growth.models.registry import vocab_size_of
    from titan_growth.run.data import prepare_run_data
    from titan_growth.run.start import Finished, Site, resolve
    from titan_growth.session import Session
    from titan_growth.tools.collectives import init_process_group, on_rank0, require_agreement
    from titan_growth.tools.device import Device

    recipe = dry_run_of(recipe)
    dry_run = recipe.comm.mode == "fake_backend"
    stop = StopSignal(recipe.job.time_limit_seconds)
    stop.install()
    _record_flights(recipe.comm, folder)
    _set_determinism(recipe.debug)
    device = Device.detect()
    # The corpus is prepared before the process group exists: it may take longer than any collective timeout.
    run_data = prepare_run_data(recipe, vocab_size_of(recipe.model), progress=report.rank == 0)
    timeout = recipe.comm.init_timeout_seconds
    init_process_group(device.type, timeout, fake=dry_run)
    try:
        with Heartbeat.of_process_group(
            long_seconds=timeout, on_stall=lambda error: give_up(report, error)
        ) as heartbeat:
            if not dry_run:
                recipe_digest = hashlib.sha256(to_toml(recipe).encode()).hexdigest()[:16]
                require_agreement({"recipe": recipe_digest, **run_data.fingerprints()})
                on_rank0(folder.create)
                on_rank0(folder.lock)
            start = resolve(recipe, Site(folder, dist.get_world_size(), device.type))
            if isinstance(start, Finished):
                return Outcome(DONE, start.message)
            checkpointer = CheckpointManager(start.recipe.checkpoint, folder.path, start.checkpoint)
            session = Session(folder, device, run_data, checkpointer, stop, heartbeat)
            heartbeat.last_checkpoint = session.last_checkpoint
            return session.run(start)
    finally:
        stop_watching_workers()
        folder.unlock()
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _record_flights(comm: CommConfig, folder: RunFolder) -> None:
    """Switches on NCCL's flight recorder, which reads the environment when it starts."""
    if not comm.trace_buf_size:
        return
    traces = folder.path / comm.save_traces_folder
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(traces / comm.save_traces_file_prefix))
    from torch.cuda import is_available

    if is_available():
        traces.mkdir(parents=True, exist_ok=True)


def _set_determinism(debug: DebugConfig) -> None:
    if debug.deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=debug.deterministic_warn_only)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


if __name__ == "__main__":
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Everything is closed and written. Interpreter shutdown would only destroy C++ objects under running threads, which
    # on a busy machine aborts one of eight ranks in about one run of ten, and fails a finished run.
    os._exit(status)
