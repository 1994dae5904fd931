"""One report per launch: which of several stays, and the verdict it leads to."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from titan_growth.liveness.exit_report import ExitReport, RankEnd, caused_by_peer, judge, process_status, read


@pytest.fixture(autouse=True)
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> str:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("spare")))
    for name in ("LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TITAN_GROWTH_LAUNCH_ID", "this")
    return "this"


def status_of(folder: Path) -> tuple[int, str]:
    report = read(folder, "this")
    assert report is not None
    return report["status"], report["message"]


def test_round_trip_leaves_one_file(tmp_path: Path) -> None:
    ExitReport(tmp_path / "new", 0).write(76, "saved", num_ranks=4)
    report = read(tmp_path / "new", "this")
    assert report is not None
    assert (report["status"], report["num_ranks"], report["rank"]) == (76, 4, 0)
    assert os.listdir(tmp_path / "new") == ["exit.json"]


def test_failure_beats_saved_in_either_order(tmp_path: Path) -> None:
    ExitReport(tmp_path, 0).write(75, "saved")
    ExitReport(tmp_path, 1).write(1, "broken")
    ExitReport(tmp_path, 0).write(75, "saved")
    assert status_of(tmp_path) == (1, "broken")


def test_first_failure_wins_and_consequences_never_hide_a_cause(tmp_path: Path) -> None:
    ExitReport(tmp_path, 0).write(1, "peer gone", secondary=True)
    ExitReport(tmp_path, 1).write(2, "cause")
    ExitReport(tmp_path, 2).write(1, "later cause")
    ExitReport(tmp_path, 3).write(1, "peer gone", secondary=True)
    assert status_of(tmp_path) == (2, "cause")


def test_only_rank_0_reports_success(tmp_path: Path) -> None:
    ExitReport(tmp_path, 1).write(0, "done")
    assert read(tmp_path, "this") is None


def test_earlier_launch_and_earlier_attempt_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ExitReport(tmp_path, 0).write(1, "old")
    assert read(tmp_path, "next") is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ExitReport(tmp_path, 0).write(0, "second attempt")
    assert status_of(tmp_path) == (0, "second attempt")
    monkeypatch.setenv("TITAN_GROWTH_LAUNCH_ID", "next")
    ExitReport(tmp_path, 0).write(75, "next launch")
    report = read(tmp_path, "next")
    assert report is not None
    assert report["status"] == 75


def test_without_launcher_the_parent_is_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TITAN_GROWTH_LAUNCH_ID")
    ExitReport(tmp_path, 0).write(0, "done")
    assert read(tmp_path, f"parent-{os.getppid()}") is not None


def test_other_nodes_write_their_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ExitReport(tmp_path, 8).write(75, "saved")
    assert read(tmp_path, "this") is None
    assert read(tmp_path, "this", node_rank=1) is not None


def test_write_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    ExitReport(tmp_path / "file" / "below", 0).write(1, "no folder there")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ExitReport(tmp_path, 0).write(1, "full")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"launch": "this"}', '{"launch": "this", "attempt": 0, "status": 1}'])
def test_damaged_report_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "exit.json").write_text(text)
    ExitReport(tmp_path, 0).write(75, "saved")
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == 75


def test_ranks_that_fail_at_once_leave_one_cause(tmp_path: Path) -> None:
    reports = [ExitReport(tmp_path, rank) for rank in range(16)]
    threads = [
        threading.Thread(target=one.write, args=(1, f"rank {one.rank}"), kwargs={"secondary": one.rank != 7})
        for one in reports
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert status_of(tmp_path) == (1, "rank 7")


def test_saved_is_no_failure_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [process_status(status) for status in (0, 1, 2, 75, 76)] == [0, 1, 2, 75, 76]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert [process_status(status) for status in (0, 1, 2, 75, 76)] == [0, 1, 2, 0, 0]


def test_caused_by_peer() -> None:
    assert caused_by_peer(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    assert caused_by_peer(type("DistBackendError", (RuntimeError,), {})("NCCL"))
    assert not caused_by_peer(RuntimeError("shape mismatch"))
    assert not caused_by_peer(ValueError("connection closed by peer"))


def report(status: int, *, rank: int = 0, secondary: bool = False) -> dict[str, Any]:
    return {"status": status, "message": "reported", "rank": rank, "local_rank": rank, "secondary": secondary}


def ends(*statuses: int) -> list[RankEnd]:
    return [RankEnd(rank, rank, status, 100.0) for rank, status in enumerate(statuses) if status]


@pytest.mark.parametrize(
    ("given", "failed", "expected", "message"),
    [
        (None, [], 0, ""),
        (report(75), [], 75, "reported"),
        (report(75), ends(75, -15), 75, "reported"),
        (report(0), ends(0, -9), 1, "rank 1 was killed by signal 9 (SIGKILL)"),
        (report(1, secondary=True), ends(1, -11), 1, "rank 1 was killed by signal 11 (SIGSEGV)"),
        (report(1, rank=1), ends(-15, 1), 1, "reported"),
        (report(2, rank=0), ends(2, -9), 2, "reported"),
        (None, ends(-15, -9), 1, "rank 1 was killed by signal 9"),
        (None, ends(2), 2, "left no report"),
        (None, ends(0, 3), 1, "rank 1 ended with status 3"),
    ],
)
def test_verdict(given: dict[str, Any] | None, failed: list[RankEnd], expected: int, message: str) -> None:
    verdict = judge(given, failed)
    assert verdict.status == expected
    assert message in verdict.message


def test_rank_killed_long_after_the_first_end_is_not_the_cause() -> None:
    failed = [RankEnd(0, 0, 3, 100.0), RankEnd(1, 1, -9, 131.0)]
    assert judge(None, failed).local_rank == 0


def test_verdict_after_a_signal() -> None:
    assert judge(None, ends(-15, -15), stopped_by="SIGTERM").status == 75
    assert judge(None, ends(-9), stopped_by="SIGTERM").status == 1
    assert judge(None, ends(-9), stopped_by="SIGINT", killed=True).message.startswith("stopped without saving")


def test_of_equal_failures_rank_0_reports(tmp_path: Path) -> None:
    ExitReport(tmp_path, rank=1).write(1, "step 2: loss nan")
    ExitReport(tmp_path, rank=0).write(1, "step 2: loss nan")
    ExitReport(tmp_path, rank=1).write(1, "step 2: loss nan")
    assert (read(tmp_path, "this") or {})["rank"] == 0
    ExitReport(tmp_path, rank=0).write(1, "something else")
    assert status_of(tmp_path) == (1, "step 2: loss nan")


def test_full_disk_sends_the_report_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the run folder cannot take it (here a file stands in its place), the launch still learns the cause, once."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "run"
    folder.write_text("in the way")
    ExitReport(folder, rank=1).write(1, "lost a peer", secondary=True)
    ExitReport(folder, rank=0).write(1, "disk full")
    ExitReport(folder, rank=1).write(1, "lost a peer", secondary=True)
    verdict = judge(read(folder, "this"), [])
    assert (verdict.status, verdict.message, verdict.reported) == (1, "disk full", False)
    assert read(folder, "this") is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
