"""How a run says what became of it.

Torchrun knows a rank only by whether its exit status is 0, and by its own habit answers everything else with 1. A
scheduler wants more: is the run done, is the recipe wrong, should it be queued again, does it need another number of
ranks. So the ranks leave one small file, `exit.json`, in the run's folder, and the launcher turns it into a status.

All ranks of a node may write the file, but only one story is told, and it is the cause: a failure beats a "saved" or
"done", a rank that failed by itself beats one that failed because its peer was gone, and among equals the first wins.
Ranks of other nodes write `exit.node1.json` and so on, since nodes need not share a folder or a launcher.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_growth.tools.files import write_atomic

DONE = 0
FAILED = 1
BAD_RECIPE = 2
REQUEUE = 75
"""Saved; run the same command again to go on."""
RESIZE = 76
"""Saved; goes on with another number of ranks."""

NOTHING_TO_DO = 10
"""The preflight's answer for a run that has already finished; the launcher ends with `DONE`."""

NOT_FAILURES = (DONE, REQUEUE, RESIZE)
LAUNCH_ID_VARIABLE = "TITAN_GROWTH_LAUNCH_ID"
_LOCK_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended on this rank."""

    status: int
    message: str = ""
    num_ranks: int | None = None
    """The number of ranks to go on with, for `RESIZE`."""


def current_launch_id() -> str:
    """The id all ranks of one launch share: given by our launcher, else the process that started them all."""
    return os.environ.get(LAUNCH_ID_VARIABLE) or f"parent-{os.getppid()}"


def report_path(dump_folder: Path, node_rank: int = 0) -> Path:
    return dump_folder / ("exit.json" if node_rank == 0 else f"exit.node{node_rank}.json")


def spare_path(launch_id: str, node_rank: int = 0) -> Path:
    """Where a report goes that the run's folder cannot take, on a full disk for one."""
    return Path(tempfile.gettempdir()) / f"titan_growth-exit-{launch_id}-{node_rank}.json"


def read(dump_folder: Path, launch_id: str, node_rank: int = 0) -> dict[str, Any] | None:
    """The report that a rank of this launch left, or None. Reports of earlier launches do not count."""
    for path in (spare_path(launch_id, node_rank), report_path(dump_folder, node_rank)):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict) and report.get("launch") == launch_id and isinstance(report.get("status"), int):
            if path == spare_path(launch_id, node_rank):
                path.unlink(missing_ok=True)
            return report
    return None


def process_status(status: int) -> int:
    """The status a rank's process should end with after it has reported `status`.

    Under torchrun a rank that ends with anything but 0 is a failure: the others are stopped, or all are restarted. A
    rank that has saved did not fail, so there it leaves with 0 and the report carries the rest.
    """
    return 0 if status in NOT_FAILURES and "TORCHELASTIC_RUN_ID" in os.environ else status


def caused_by_peer(error: BaseException) -> bool:
    """Whether an error only tells that another rank is gone; such a report must not hide the other rank's own."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")
    return isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in signs)


def timed_out(error: BaseException) -> bool:
    """Whether an error is that of a collective that has waited too long for another rank."""
    text = str(error).lower()
    signs = ("timed out waiting", "application timeout", "collective operation timeout")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


class ExitReport:
    """One rank's pen for the report. It never raises: a full disk must not hide the error that is being reported."""

    def __init__(self, dump_folder: Path, rank: int) -> None:
        self.rank = rank
        self.local_rank = _integer(os.environ, "LOCAL_RANK", rank)
        node_rank = _integer(os.environ, "GROUP_RANK", 0)
        self.path = report_path(dump_folder, node_rank)
        self._launch = current_launch_id()
        self._spare = spare_path(self._launch, node_rank)
        # Torchrun may restart the ranks inside one launch; what an earlier attempt reported is then out of date.
        self._attempt = _integer(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)

    def write(self, status: int, message: str, *, num_ranks: int | None = None, secondary: bool = False) -> None:
        """Report `status`; `secondary` marks a failure that is only the consequence of another rank's."""
        if status in NOT_FAILURES and self.local_rank != 0:
            return
        report = {
            "status": status,
            "message": message,
            "num_ranks": num_ranks,
            "rank": self.rank,
            "local_rank": self.local_rank,
            "secondary": secondary,
            "launch": self._launch,
            "attempt": self._attempt,
            "time": time.time(),
        }
        weight = _weight(report)
        try:
            with _locked(self.path.parent):
                written = self._written()
                standing = _weight(written) if written else -1
                # Ranks that fail together often tell the same; then it is rank 0's, whose output is usually shown.
                same = written is not None and weight == standing and written.get("message") == message
                if weight > standing or weight == standing == 0 or (same and self.rank == 0):
                    write_atomic(self.path, json.dumps(report, indent=2) + "\n")
        except (OSError, ValueError):
            # The rank's output is kept in the same folder, so what it has printed is likely to be lost as well.
            if weight == 2 or not self._spare.exists():
                with contextlib.suppress(OSError):
                    write_atomic(self._spare, json.dumps({**report, "printed": False}) + "\n")

    def _written(self) -> dict[str, Any] | None:
        """The report that is already there, unless it is of an older launch or attempt."""
        try:
            report: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            current = (report["launch"], report["attempt"]) == (self._launch, self._attempt)
            return report if current and _weight(report) >= 0 else None
        except (OSError, ValueError, TypeError, KeyError):
            return None


def _weight(report: Mapping[str, Any]) -> int:
    if report["status"] in NOT_FAILURES:
        return 0
    return 1 if report["secondary"] else 2


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdigit() else default


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two ranks that fail at once do not both find no report.

    Locking the folder itself leaves no lock file behind. Some network file systems cannot do it; then two failures in
    the same millisecond may swap places, which is no reason to lose both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RankEnd:
    """How one rank's process ended, as its parent saw it: a negative status is the signal that killed it."""

    rank: int
    local_rank: int
    status: int
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What became of a launch: the status, what to tell, and the local rank whose story that is."""

    status: int
    message: str = ""
    local_rank: int | None = None
    reported: bool = False
    """The rank printed the message itself."""
    num_ranks: int | None = None


def judge(report: dict[str, Any] | None, failed: list[RankEnd], stopped_by: str = "", killed: bool = False) -> Verdict:
    """Put the report, the ranks that did not end with 0, and a signal sent to the launch into one verdict."""
    cause = _cause(failed)
    sudden = cause is not None and cause.status not in (-signal.SIGTERM, -signal.SIGUSR1, *NOT_FAILURES)
    if report is not None:
        good = report["status"] in NOT_FAILURES
        # A rank that died without a word after another said "saved" or "lost my peer" is what really happened. One
        # that was ended by the SIGTERM which follows the first exit is not.
        silent = cause is not None and cause.rank != report["rank"] and sudden
        if not (silent and (good or (report["secondary"] and cause is not None and cause.status < 0))):
            printed = report.get("printed", True)
            return Verdict(report["status"], report["message"], report["local_rank"], printed, report.get("num_ranks"))
    if stopped_by and not killed and not sudden:
        return Verdict(REQUEUE, f"stopped by {stopped_by} before training had begun; run the same command again")
    if killed:
        return Verdict(FAILED, "stopped without saving; run the same command again to resume from the last checkpoint")
    if cause is None:
        return Verdict(DONE)
    if cause.status < 0:
        end = f"was killed by signal {-cause.status} ({signal_name(-cause.status)})"
        advice = "run the same command again to resume from the last checkpoint"
        return Verdict(FAILED, f"rank {cause.rank} {end}; {advice}", cause.local_rank)
    # No report, for instance on a full disk: the status of the process itself still follows the same convention.
    status = cause.status if cause.status in (BAD_RECIPE, REQUEUE, RESIZE) else FAILED
    message = f"rank {cause.rank} ended with status {cause.status} and left no report; its own output tells why"
    return Verdict(status, message, cause.local_rank)


def _cause(failed: list[RankEnd]) -> RankEnd | None:
    """The rank that failed first.

    Of those that ended together, the one killed from outside took the others along; then one that left by itself; a
    SIGTERM is what torchrun ends the rest with.
    """
    if not failed:
        return None
    first = min(end.seconds for end in failed)
    together = [end for end in failed if end.seconds <= first + 1]

    def suspicion(end: RankEnd) -> int:
        return 2 if end.status == -signal.SIGTERM else 1 if end.status >= 0 else 0

    return min(together, key=lambda end: (suspicion(end), end.seconds, end.rank))


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
