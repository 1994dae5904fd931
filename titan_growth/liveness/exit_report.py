"""How a run reports its outcome.

Torchrun only knows whether a rank's exit status is 0, and turns any other into 1. A scheduler needs more: is the run
done, is the recipe wrong, should it be requeued, does it need another number of ranks. So the ranks leave one small
file, `exit.json`, in the run folder, and the launcher turns it into a status.

All ranks of a node may write the file, but it keeps one report, the cause: a failure beats "saved" or "done", a rank
that failed by itself beats one that lost its peer, and among equals the first wins. Other nodes write `exit.node1.json`
and so on, since nodes need not share a folder or a launcher.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
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
"""Saved; run the same command again to continue."""
RESIZE = 76
"""Saved; to be continued with another number of ranks."""

NOTHING_TO_DO = 10
"""Preflight's status for a run that has already finished; the launcher exits with `DONE`."""

NOT_FAILURES = (DONE, REQUEUE, RESIZE)
LAUNCH_ID_VARIABLE = "TITAN_GROWTH_LAUNCH_ID"
_LOCK_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended on this rank."""

    status: int
    message: str = ""
    num_ranks: int | None = None
    """The number of ranks to continue with, for `RESIZE`."""


def current_launch_id() -> str:
    """The id that all ranks of a launch share: set by our launcher, else their parent process."""
    return os.environ.get(LAUNCH_ID_VARIABLE) or f"parent-{os.getppid()}"


def report_path(dump_folder: Path, node_rank: int = 0) -> Path:
    return dump_folder / ("exit.json" if node_rank == 0 else f"exit.node{node_rank}.json")


def spare_path(launch_id: str, node_rank: int = 0) -> Path:
    """Where the report goes if the run folder cannot take it, such as on a full disk."""
    return Path(tempfile.gettempdir()) / f"titan_growth-exit-{launch_id}-{node_rank}.json"


def read(dump_folder: Path, launch_id: str, node_rank: int = 0) -> dict[str, Any] | None:
    """The report of this launch, or None. Reports of earlier launches are ignored."""
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
    """The status a rank's process should exit with after reporting `status`.

    To torchrun any status but 0 is a failure: it stops the other ranks or restarts all. A rank that saved did not fail,
    so under torchrun it exits with 0, and the report carries the rest.
    """
    return 0 if status in NOT_FAILURES and "TORCHELASTIC_RUN_ID" in os.environ else status


def caused_by_peer(error: BaseException) -> bool:
    """Whether an error only means that another rank is gone; it must not hide that rank's own report."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")
    return isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in signs)


def lost_worker(error: BaseException) -> str | None:
    """What PyTorch says of a loader's worker process that is gone, if that is what an error means."""
    found = re.search(r"DataLoader worker \(pid.*", str(error))
    return found[0].strip(" .") if found and isinstance(error, RuntimeError) else None


def stop_watching_workers() -> None:
    """Call when a run has ended, so that its report is not lost to a second error.

    PyTorch answers the end of a loader's worker with an error wherever the program happens to be.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def timed_out(error: BaseException) -> bool:
    """Whether an error is a collective's timeout."""
    text = str(error).lower()
    signs = ("timed out waiting", "application timeout", "collective operation timeout")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


class ExitReport:
    """Writes the report for one rank. Never raises: a full disk must not hide the error being reported."""

    def __init__(self, dump_folder: Path, rank: int) -> None:
        self.rank = rank
        self.local_rank = _integer(os.environ, "LOCAL_RANK", rank)
        node_rank = _integer(os.environ, "GROUP_RANK", 0)
        self.path = report_path(dump_folder, node_rank)
        self._launch = current_launch_id()
        self._spare = spare_path(self._launch, node_rank)
        # Torchrun may restart the ranks within a launch; reports of earlier attempts are then stale.
        self._attempt = _integer(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)

    def write(self, status: int, message: str, *, num_ranks: int | None = None, secondary: bool = False) -> None:
        """Reports `status`; `secondary` marks a failure that is only the consequence of another rank's."""
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
                current = self._current()
                current_weight = _weight(current) if current else -1
                # Ranks that fail together often report the same; prefer rank 0, whose output is usually shown.
                same = current is not None and weight == current_weight and current.get("message") == message
                if weight > current_weight or weight == current_weight == 0 or (same and self.rank == 0):
                    write_atomic(self.path, json.dumps(report, indent=2) + "\n")
        except (OSError, ValueError):
            # The rank's output goes to the same folder, so it is probably lost too: "printed" is false.
            if weight == 2 or not self._spare.exists():
                with contextlib.suppress(OSError):
                    write_atomic(self._spare, json.dumps({**report, "printed": False}) + "\n")

    def _current(self) -> dict[str, Any] | None:
        """The report already there, unless it is of an older launch or attempt."""
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
    """Locks the folder, so that two ranks failing at once do not both find no report.

    Locking the folder itself leaves no lock file behind. Some network file systems cannot; there, one of two failures
    in the same millisecond may win by chance, which beats losing both.
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
    """How a rank's process ended, as seen by its parent; a negative status is the signal that killed it."""

    rank: int
    local_rank: int
    status: int
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """The outcome of a launch: status, message, and the local rank that caused it."""

    status: int
    message: str = ""
    local_rank: int | None = None
    reported: bool = False
    """The rank printed the message itself."""
    num_ranks: int | None = None


def judge(report: dict[str, Any] | None, failed: list[RankEnd], stopped_by: str = "", killed: bool = False) -> Verdict:
    """Combines the report, the ranks with a status other than 0, and a signal to the launch into one verdict."""
    cause = _cause(failed)
    sudden = cause is not None and cause.status not in (-signal.SIGTERM, -signal.SIGUSR1, *NOT_FAILURES)
    if report is not None:
        good = report["status"] in NOT_FAILURES
        # A rank that died silently beats a report of "saved" or "lost my peer". One killed by the SIGTERM that follows
        # the first exit does not.
        silent = cause is not None and cause.rank != report["rank"] and sudden
        if not (silent and (good or (report["secondary"] and cause is not None and cause.status < 0))):
            printed = report.get("printed", True)
            return Verdict(report["status"], report["message"], report["local_rank"], printed, report.get("num_ranks"))
    if stopped_by and not killed and not sudden:
        return Verdict(REQUEUE, f"stopped by {stopped_by} before training began; run the same command again")
    if killed:
        return Verdict(FAILED, "stopped without saving; run the same command again to resume from the last checkpoint")
    if cause is None:
        return Verdict(DONE)
    if cause.status < 0:
        end = f"was killed by signal {-cause.status} ({signal_name(-cause.status)})"
        advice = "run the same command again to resume from the last checkpoint"
        return Verdict(FAILED, f"rank {cause.rank} {end}; {advice}", cause.local_rank)
    # No report, such as on a full disk: the process status follows the same convention.
    status = cause.status if cause.status in (BAD_RECIPE, REQUEUE, RESIZE) else FAILED
    message = f"rank {cause.rank} ended with status {cause.status} and left no report; see its own output"
    return Verdict(status, message, cause.local_rank)


def _cause(failed: list[RankEnd]) -> RankEnd | None:
    """The rank that failed first.

    Of those that ended together, prefer one killed by a signal, then one that exited by itself. SIGTERM comes last:
    torchrun ends the rest with it.
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
