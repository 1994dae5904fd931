"""Stop signals, the time limit, and ranks whose launcher has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_growth.liveness import stop_signal as signals
from titan_growth.liveness.stop_signal import LAUNCHED_VARIABLE, StopSignal, seconds_since_launch

RANK = """
import sys, time
from pathlib import Path
from titan_growth.liveness.stop_signal import StopSignal
stop = StopSignal()
stop.install()
Path(sys.argv[1]).write_text("ready")
while not stop.is_set:
    time.sleep(0.01)
Path(sys.argv[1]).write_text(stop.name)
"""
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
time.sleep(60)
"""


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and path.read_text() == text:
            return
        time.sleep(0.02)
    pytest.fail(f"{path.name} never contained {text!r}")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its parent dies")
def test_ranks_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """SIGKILL to the launcher alone reaches the rank as a stop signal."""
    mark = tmp_path / "mark"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK, str(mark)], env=environment)
    wait_for(mark, "ready")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(mark, "SIGTERM")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_stop_signal_sets_the_flag(number: signal.Signals, tmp_path: Path) -> None:
    """And the process carries on."""
    mark = tmp_path / "mark"
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(mark)])
    wait_for(mark, "ready")
    rank.send_signal(number)
    assert rank.wait(timeout=20) == 0
    assert mark.read_text() == number.name


def test_the_time_limit_sets_the_flag_and_the_reason() -> None:
    """A signal that came first remains the reason."""
    elapsed = 9.5
    stop = StopSignal(10, lambda: elapsed)
    assert not stop.is_set
    assert stop.reason == ""
    elapsed = 10.0
    assert stop.is_set
    assert stop.reason == " (job.time_limit_seconds = 10 is over)"
    assert not StopSignal(None, lambda: 1e9).is_set
    signalled = StopSignal(10, lambda: 0.0)
    signalled.name = "SIGTERM"
    signalled._elapsed = lambda: 11.0
    assert signalled.is_set
    assert signalled.reason == ""


def test_the_limit_is_counted_from_the_launch_by_a_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that jumps back by a year changes nothing."""
    monkeypatch.setenv(LAUNCHED_VARIABLE, repr(time.monotonic() - 100))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 100 <= seconds_since_launch() < 110
    assert StopSignal(100).is_set
    assert not StopSignal(200).is_set
    monkeypatch.delenv(LAUNCHED_VARIABLE)
    assert 0 <= seconds_since_launch() <= time.monotonic() - signals._IMPORTED
