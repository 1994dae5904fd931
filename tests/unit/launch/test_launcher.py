"""The launcher with real ranks, which run small modules in place of the trainer.

It runs in a forked process, which has torch already; the first test and the last start it as users do.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.forked import Forked
from titan_growth.launch import launcher

CHECKOUT = Path(__file__).resolve().parents[3]
OURS = ("NGPU", "CONFIG_FILE", "LOG_RANK", "TRAIN_FILE", "COMM_MODE", "NNODES", "NODE_RANK", "MASTER_ADDR")
OTHERS = ("MASTER_PORT", "MAX_RESTARTS", "OMP_NUM_THREADS", "SLURM_JOB_ID", "LOGLEVEL", "TITAN_GROWTH_DUMP_FOLDER")

# Every training module of these tests starts with its rank and an exit report.
HEAD = """
import os, signal, sys, time
from pathlib import Path
from titan_growth.liveness.exit_report import ExitReport, process_status
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
report = ExitReport(Path("outputs"), rank)
"""
# Only the preflight differs from the real launch.
LAUNCH = """
import sys
from tests.unit.launch.test_launcher import launch
sys.exit(launch(sys.argv[1:], 0))
"""


def launch(argv: list[str], status: int) -> int:
    """The launcher with a preflight that ends with a status, or with a negative one not before it is stopped."""

    def preflight(argv: list[str]) -> int:
        print("preflight for", os.environ["WORLD_SIZE"], "with", *argv, flush=True)
        if status < 0:
            Path("checking").touch()
            time.sleep(60)
        return status

    return launcher.main(argv, preflight=preflight)


class Folder:
    """A caller's folder with a recipe and a module to train with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "recipe.toml").write_text("[job]\n")

    def module(self, body: str) -> None:
        (self.path / "tiny_train.py").write_text(HEAD + textwrap.dedent(body))

    def environ(self, **variables: str) -> dict[str, str]:
        environ = {name: value for name, value in os.environ.items() if name not in OURS + OTHERS}
        ours = {"PYTHONPATH": str(CHECKOUT), "TRAIN_FILE": "tiny_train", "CONFIG_FILE": "recipe.toml"}
        return environ | ours | variables

    def start(self, *argv: str, preflight: int = 0, **variables: str) -> Forked:
        return Forked(
            lambda: launch([*argv], preflight), folder=self.path, environ=self.environ(**variables), paths=(self.path,)
        )

    def run_as_users_do(self, *argv: str, **variables: str) -> tuple[int, str]:
        command = [sys.executable, "-c", LAUNCH, *argv]
        pipe, environ = subprocess.PIPE, self.environ(**variables)
        process = subprocess.Popen(
            command, cwd=self.path, env=environ, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        return self.finish(process)

    def run(self, *argv: str, preflight: int = 0, **variables: str) -> tuple[int, str]:
        return self.finish(self.start(*argv, preflight=preflight, **variables))

    def finish(self, process: subprocess.Popen[str] | Forked) -> tuple[int, str]:
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output
        assert process.returncode is not None
        return process.returncode, output

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 40
        while not all((self.path / name).exists() for name in names):
            assert time.monotonic() < deadline, f"not all of {names} appeared"
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_ranks_run_the_module_and_only_log_rank_is_shown(folder: Folder) -> None:
    folder.module("""
        print("rank", rank, "of", ranks, "threads", os.environ["OMP_NUM_THREADS"], *sys.argv[1:])
        if rank == 0:
            report.write(0, "done")
    """)
    status, output = folder.run_as_users_do("--training.steps", "3", NGPU="2", LOG_RANK="1")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert status == 0
    assert "preflight for 2 with --job.config_file recipe.toml --training.steps 3" in output
    assert f"[rank1]:rank 1 of 2 threads {threads} --job.config_file recipe.toml --training.steps 3" in output
    assert "rank 0 of 2" not in output


def test_failure_of_a_hidden_rank_is_reported_once_with_its_status(folder: Folder) -> None:
    folder.module("""
        if rank == 1:
            print("data.folder: no such folder", file=sys.stderr)
            report.write(2, "data.folder: no such folder")
            sys.exit(2)
        time.sleep(2)
        report.write(1, "peer gone", secondary=True)
        sys.exit(1)
    """)
    status, output = folder.run(NGPU="2")
    assert status == 2
    assert output.count("data.folder: no such folder") == 1
    assert "FAILED" not in output
    status, output = folder.run(NGPU="2", LOG_RANK="0,1")
    assert status == 2
    assert output.count("data.folder: no such folder") == 1


def test_killed_rank_is_reported_in_one_line(folder: Folder) -> None:
    folder.module("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        report.write(1, "connection closed by peer", secondary=True)
        sys.exit(1)
    """)
    status, output = folder.run(NGPU="2")
    assert status == 1
    assert "rank 1 was killed by signal 9 (SIGKILL); run the same command again to resume" in output


SAVING = """
    def save(number, frame):
        time.sleep(0.5)
        report.write(75, f"saved on {signal.Signals(number).name}")
        print("saved on", signal.Signals(number).name, flush=True)
        sys.exit(process_status(75))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save)
    Path(f"ready{rank}").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_reaches_the_ranks_which_save(folder: Folder, number: signal.Signals) -> None:
    folder.module(SAVING)
    process = folder.start(NGPU="2")
    folder.wait_for("ready0", "ready1")
    process.send_signal(number)
    status, output = folder.finish(process)
    assert status == 75
    received = "SIGUSR1" if number == signal.SIGUSR1 else "SIGTERM"
    assert output.count(f"saved on {received}") == 1


def test_third_interrupt_stops_ranks_that_do_not_save(folder: Folder) -> None:
    folder.module("""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        Path(f"ready{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    """)
    process = folder.start(NGPU="1")
    folder.wait_for("ready0")
    for _ in range(3):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    status, output = folder.finish(process)
    assert status == 1
    assert "Ctrl-C once more stops without saving" in output
    assert "stopped without saving" in output


def test_other_number_of_ranks_is_started_here_or_left_to_the_scheduler(folder: Folder) -> None:
    folder.module("""
        print("ranks", ranks)
        wanted = 1 if ranks == 2 else None
        report.write(76 if wanted else 0, f"status of {ranks}", num_ranks=wanted)
    """)
    status, output = folder.run(NGPU="2")
    assert status == 0
    assert output.index("[rank0]:ranks 2") < output.index("preflight for 1") < output.index("[rank0]:ranks 1")
    status, output = folder.run(NGPU="2", SLURM_JOB_ID="7")
    assert status == 76
    assert "ranks 1" not in output
    assert "continues with 1 ranks" in output


def test_restarted_ranks_are_judged_by_their_last_attempt(folder: Folder) -> None:
    folder.module("""
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        report.write(0 if attempt else 1, f"attempt {attempt}")
        sys.exit(0 if attempt else 1)
    """)
    assert folder.run(MAX_RESTARTS="1", NGPU="1")[0] == 0


def test_module_that_leaves_no_report(folder: Folder) -> None:
    folder.module("""
        if rank == 1:
            print("odd", file=sys.stderr)
            sys.exit(3)
    """)
    status, output = folder.run(NGPU="2")
    assert status == 1
    assert "rank 1 ended with status 3 and left no report" in output
    assert "Output of local rank 1: " in output


def test_dry_run_is_one_process_and_one_step(folder: Folder) -> None:
    folder.module("print(rank, ranks, os.environ['LOCAL_RANK'], 'TORCHELASTIC_RUN_ID' in os.environ, *sys.argv[1:])")
    status, output = folder.run("--training.steps=900", NGPU="64", COMM_MODE="fake_backend")
    assert status == 0
    assert "0 64 0 False --job.config_file recipe.toml --comm.mode fake_backend --training.steps 1" in output


@pytest.mark.parametrize(("preflight", "expected"), [(1, 1), (2, 2), (10, 0)])
def test_preflight_can_end_the_launch(folder: Folder, preflight: int, expected: int) -> None:
    folder.module("print('started')")
    status, output = folder.run(preflight=preflight, NGPU="1")
    assert status == expected
    assert "started" not in output


def test_signal_during_the_preflight_ends_the_launch_at_once(folder: Folder) -> None:
    folder.module("print('started')")
    process = folder.start(preflight=-1, NGPU="1")
    folder.wait_for("checking")
    process.send_signal(signal.SIGTERM)
    status, output = folder.finish(process)
    assert status == 75
    assert output.splitlines()[-1].startswith("stopped by SIGTERM before training began")


def test_two_nodes(folder: Folder) -> None:
    folder.module("""
        print("rank", rank, "of", ranks)
        report.write(75, "saved")
        sys.exit(process_status(75))
    """)
    common = {"NGPU": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [folder.start(NODE_RANK=str(rank), **common) for rank in range(2)]
    ends = [folder.finish(node) for node in nodes]
    assert [status for status, _ in ends] == [75, 75]
    assert "rank 1 of 2" in ends[1][1]
    assert {path.name for path in (folder.path / "outputs").glob("exit*")} == {"exit.json", "exit.node1.json"}


def test_run_train_script_from_another_folder_and_through_a_link(folder: Folder) -> None:
    link = folder.path / "train"
    link.symlink_to(CHECKOUT / "run_train.sh")
    environ = {**os.environ, "COMM_MODE": "local_tensor", "VIRTUAL_ENV": sys.prefix, "TRAIN_FILE": "json"}
    command = [link, "--job.config_file", "recipe.toml"]
    ended = subprocess.run(command, cwd=folder.path, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: COMM_MODE=local_tensor is not supported")
    assert len(ended.stderr.splitlines()) == 1
