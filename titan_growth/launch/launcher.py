"""`python -m titan_growth.launch`: check a recipe, start its ranks, and end with a meaningful status.

`run_train.sh` becomes this process, which runs torchrun as a library, so that the last thing on the screen is the
failing rank's own message and not torchrun's report. First the environment is read, then the preflight validates the
recipe and prepares the data, then torchrun starts one process per rank. The ranks' report
(`titan_growth.liveness.exit_report`) gives the status: 0 done, 1 failed, 2 bad recipe, 75 saved and to be queued again,
76 saved and to continue with another number of ranks, which on one node without a scheduler happens here at once.

Torchrun would give signalled ranks a fixed time and then kill them, maybe during a save. So signals are passed on here
(`titan_growth.launch.relay`), and the launcher waits for the ranks to end.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from titan_growth.launch.relay import Interrupted, SignalRelay, rank_processes, signal_ranks
from titan_growth.launch.settings import LaunchSettings, drop_option, dump_folder_of, read_settings
from titan_growth.liveness import exit_report
from titan_growth.liveness.exit_report import DONE, NOTHING_TO_DO, REQUEUE, RESIZE, RankEnd, Verdict
from titan_growth.liveness.stop_signal import LAUNCHED_VARIABLE
from titan_growth.tools.errors import TitanGrowthError
from titan_growth.tools.logs import say
from titan_growth.tools.text import many

DUMP_FOLDER_VARIABLE = "TITAN_GROWTH_DUMP_FOLDER"
CHECKOUT_VARIABLE = "TITAN_GROWTH_CHECKOUT"
SCHEDULER_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "OAR_JOB_ID")

Preflight = Callable[[list[str]], int]


def main(argv: list[str] | None = None, preflight: Preflight | None = None) -> int:
    """Launches a run; returns its exit status. Tests pass their own `preflight`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        os.execv(sys.executable, [sys.executable, "-m", "titan_growth", "train", *argv])
    os.environ[LAUNCHED_VARIABLE] = repr(time.monotonic())
    for stream in (sys.stdout, sys.stderr):
        # The ranks' output passes through here; into a pipe it would otherwise come in blocks of 8 KiB.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    relay = SignalRelay()
    try:
        with relay.installed():
            return _launch(argv, preflight or _preflight, relay)
    except Interrupted as stop:
        # Before the ranks start there is nothing to save; between two launches everything is saved.
        signal_ranks(rank_processes(), signal.SIGKILL)
        say(exit_report.judge(None, [], stopped_by=stop.name).message)
        return REQUEUE
    except TitanGrowthError as error:
        say("\n".join(f"error: {line}" for line in str(error).splitlines()))
        return error.exit_status


def _launch(argv: list[str], preflight: Preflight, relay: SignalRelay) -> int:
    checkout = Path(os.environ.get(CHECKOUT_VARIABLE) or Path(__file__).resolve().parents[2])
    settings = read_settings(argv, os.environ, checkout, _cuda_devices)
    if settings.comm_mode:
        arguments = drop_option(drop_option(settings.args, "--comm.mode"), "--training.steps")
        # A dry run stays short, whatever number of steps is asked for.
        arguments += ["--comm.mode", settings.comm_mode, "--training.steps", "1"]
        settings = replace(settings, args=tuple(arguments))
    while True:
        status = _check(settings, preflight)
        if status != DONE:
            return DONE if status == NOTHING_TO_DO else status
        if settings.comm_mode:
            _dry_run(settings)
        verdict, hidden_output = _train(settings, relay)
        if verdict.message and (not verdict.reported or verdict.local_rank not in settings.shown):
            # A shown rank without a report may have died in the middle of a line.
            cut_off = not verdict.reported and verdict.local_rank in settings.shown
            say("\n" * cut_off + verdict.message)
            if hidden_output is not None and verdict.status not in (DONE, REQUEUE, RESIZE):
                say(f"Output of local rank {verdict.local_rank}: {hidden_output}")
        if verdict.status != RESIZE or not _may_relaunch(settings, verdict, relay):
            return verdict.status
        settings = replace(settings, ranks=verdict.num_ranks or settings.ranks)
        say(f"Continuing with {many(settings.ranks, 'rank')}")


def _check(settings: LaunchSettings, preflight: Preflight) -> int:
    """Runs the preflight in this process, with the run's number of ranks in WORLD_SIZE."""
    os.environ.pop(DUMP_FOLDER_VARIABLE, None)
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(settings.world_size)
    try:
        return preflight(list(settings.args))
    finally:
        # Torchrun sets it for each rank; here it would only confuse libraries.
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _preflight(argv: list[str]) -> int:
    # Imported late: it loads torch and the data libraries, and a wrong variable need not wait for those.
    from titan_growth.commands.check import preflight

    return preflight(argv)


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dry_run(settings: LaunchSettings) -> None:
    """Becomes the one process of a dry run, which acts as rank 0; we exit with its status."""
    environ = dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(settings.world_size))
    environ["LOCAL_WORLD_SIZE"] = str(settings.ranks)
    environ[exit_report.LAUNCH_ID_VARIABLE] = _new_launch_id()
    os.execve(sys.executable, [sys.executable, "-u", "-m", settings.module, *settings.args], environ)


def _train(settings: LaunchSettings, relay: SignalRelay) -> tuple[Verdict, Path | None]:
    """Runs all ranks of this node; (the verdict, the output of the rank it is about if that was not shown)."""
    launch_id = _new_launch_id()
    os.environ[exit_report.LAUNCH_ID_VARIABLE] = launch_id
    dump_folder = Path(os.environ.get(DUMP_FOLDER_VARIABLE) or dump_folder_of(settings.args))
    logs = _log_folder(dump_folder, launch_id)
    user_threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = user_threads or str(settings.threads)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Waiting threads soon stop spinning: 3 % slower on free cores, twice as fast on shared ones.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        failed = _run_elastic(settings, launch_id, logs)
    except Interrupted:
        # The signal came just after the last rank had ended: the report still counts.
        failed = []
        signal_ranks(rank_processes(), signal.SIGKILL)
    finally:
        if user_threads is None:
            del os.environ["OMP_NUM_THREADS"]
    report = exit_report.read(dump_folder, launch_id, settings.node_rank)
    attempts = len(list(logs.glob("*/attempt_*")))
    if report is not None and report.get("attempt", 0) < attempts - 1:
        report = None
    verdict = exit_report.judge(report, failed, relay.stopped_by, relay.killed)
    outputs = list(logs.glob(f"*/attempt_{attempts - 1}/{verdict.local_rank}/stderr.log"))
    hidden = outputs and verdict.local_rank not in settings.shown and outputs[0].stat().st_size > 0
    return verdict, outputs[0] if hidden else None


def _run_elastic(settings: LaunchSettings, launch_id: str, logs: Path) -> list[RankEnd]:
    """Starts the ranks with torchrun and waits; returns those that did not end with status 0."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    _quiet_torchrun()
    options = [f"--nproc-per-node={settings.ranks}", f"--max-restarts={settings.max_restarts}"]
    if settings.nodes == 1:
        # Port 0 is any free port, so that runs on one machine do not meet. The address is given because the host name,
        # torchrun's choice, does not resolve everywhere.
        options += ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
        options += [f"--rdzv-id={launch_id}"]
    else:
        options += [f"--nnodes={settings.nodes}", f"--node-rank={settings.node_rank}", "--rdzv-backend=static"]
        options += [f"--master-addr={settings.master_addr}", f"--master-port={settings.master_port}"]
    options += ["--role=rank", "--tee=3", f"--log-dir={logs}"]
    options += [f"--local-ranks-filter={','.join(map(str, settings.shown))}"]
    # No signal has this name, so torchrun leaves our handlers alone.
    options += ["--signals-to-handle=NONE"]
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", settings.module, *settings.args]))
    except ChildFailedError as error:
        failures = error.failures.items()
        return [RankEnd(rank, end.local_rank, end.exitcode, end.timestamp) for rank, end in failures]
    except (OSError, RuntimeError, ValueError, RendezvousError) as error:
        where = f"{settings.master_addr}:{settings.master_port}" if settings.nodes > 1 else "this machine"
        hint = "Check MASTER_ADDR, MASTER_PORT and that all nodes are started" if settings.nodes > 1 else "Try again"
        # After its first line, an error of torch's store lists C++ frames.
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TitanGrowthError(f"The ranks could not be started at {where}: {reason}. {hint}") from error
    return []


def _quiet_torchrun() -> None:
    """Keeps torchrun's log off the screen unless LOGLEVEL is set: the ranks report themselves."""
    if "LOGLEVEL" not in os.environ:
        logger = logging.getLogger("torch.distributed")
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]


def _log_folder(dump_folder: Path, launch_id: str) -> Path:
    """Where the output of all ranks is kept: `<dump_folder>/logs/<launch>`."""
    folder = dump_folder.absolute() / "logs" / launch_id
    try:
        folder.mkdir(parents=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="titan_growth_logs_"))
    return folder


def _new_launch_id() -> str:
    """Readable and unique: in containers process ids repeat, and clocks can be set back."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"


def _may_relaunch(settings: LaunchSettings, verdict: Verdict, relay: SignalRelay) -> bool:
    """Whether to act on status 76 here; prints what to do instead if not."""
    wanted = verdict.num_ranks
    if not isinstance(wanted, int) or wanted < 1 or wanted == settings.ranks:
        say(f"The run asks for {wanted} ranks and had {settings.ranks}; run the same command again with NGPU set")
    elif settings.devices and wanted > settings.devices:
        say(
            f"Saved. The run continues with {wanted} ranks, but this machine has {settings.devices} devices; "
            f"run the same command with NGPU={wanted} on a larger one"
        )
    elif settings.nodes > 1 or relay.stopped_by or any(name in os.environ for name in SCHEDULER_VARIABLES):
        say(f"Saved. The run continues with {wanted} ranks in total: run the same command again with that number")
    else:
        return True
    return False
