"""Heartbeats: each rank publishes where it is, so that a hang ends in a message naming the rank.

A thread writes a beat to the process group's store every second: a counter, the main thread's step and phase, and the
top of its stack. Under torchrun the launcher hosts the store, so it outlives the ranks. Beats are read only when
something goes wrong:

    a collective failed              gloo raises after its timeout or when a peer is gone, but cannot name the rank
    the main thread does not move    NCCL waits on the device, invisible to Python; this rank's own thread notices

The second triggers a little later than the first, so that a backend that raises does so first. In long pauses
(validation, saving, growth), only a rank that does not answer is a reason to give up before the initial timeout. Time
during which the whole process was suspended does not count.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from titan_growth.liveness.exit_report import FAILED, ExitReport, caused_by_peer, process_status, timed_out
from titan_growth.liveness.hang import LONG_PHASES, Beat, Diagnosis, HangError, diagnose, end_processes
from titan_growth.liveness.waits import wait_of
from titan_growth.tools.collectives import timeout_in_force
from titan_growth.tools.logs import say
from titan_growth.tools.torch_private import default_store

GRACE_SECONDS = 5.0
"""How long beyond the timeout a main thread may stand still, so that a collective that raises does so first."""
SAVING_SECONDS = 3600.0
"""How long a save may stand still while all ranks answer: a slow disk is not a hang."""
LOOK_BEATS = 4
"""Beats between two snapshots; four times as many in long phases."""
AGAIN_SECONDS = 30.0
"""Until the next diagnosis, after one without a reason to give up."""
RANKS_PER_SECOND = 256
"""Most beats per second for the store; with more ranks, each beats more slowly."""

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_COLLECTIVES = os.path.join("torch", "distributed", "")


class Heartbeat:
    """Publishes this rank's beats. As a context manager it turns a failed collective into a `HangError`.

    Args:
        long_seconds: how long ranks may stand still in `LONG_PHASES` while all answer.
        on_stall: gets the HangError of a stalled main thread; must not return.
        store: of the process group; None turns the heartbeat off (one rank, a dry run).
        interval_seconds: between two beats.
    """

    def __init__(
        self,
        *,
        long_seconds: float,
        on_stall: Callable[[HangError], Any],
        store: Any,
        interval_seconds: float | None = None,
    ) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.interval_seconds = interval_seconds or max(1.0, self.num_ranks / RANKS_PER_SECOND)
        self.phase, self.step = "start", 0
        self._long_seconds = long_seconds
        self.last_checkpoint: Callable[[], str] = lambda: "Run the same command again"
        """What the run can resume from; ends a message."""
        self._on_stall = on_stall
        self._host = socket.gethostname()
        self._main = threading.main_thread().ident
        self._position = self._count = self._moves = 0
        self._seen: tuple[int, ...] = ()
        self._stalled_seconds = self._last_stalled_seconds = self._patient_until = 0.0
        self._asking: Beat | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._store: Any = None
        if store is not None:
            # A separate client: the main thread may be blocked in the original.
            self._store = store.clone()
            self._store.set_timeout(timedelta(seconds=5))
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @classmethod
    def of_process_group(cls, **settings: Any) -> Heartbeat:
        """For the default process group; off on a single rank."""
        alone = dist.get_world_size() == 1 or dist.get_backend() == "fake"
        return cls(store=None if alone else default_store(), **settings)

    # ---- the main thread -----------------------------------------------------------------------------------------

    def mark(self, phase: str, step: int) -> None:
        """The main thread enters a phase of a step. All ranks pass the same marks."""
        self._position += 1
        self.phase, self.step = phase, step

    def __enter__(self) -> Heartbeat:
        if self._store is not None:
            self._beat()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        lost, late = error is not None and caused_by_peer(error), error is not None and timed_out(error)
        try:
            if error is not None and (lost or late):
                raise self._explain(error, lost=lost) from error
        finally:
            self._leave("done" if error is None or lost or late else "failed")

    def _explain(self, error: BaseException, *, lost: bool) -> HangError:
        """Explains a collective that failed on this rank; takes a few seconds."""
        # The main thread just left the collective, so the thread may have reset its count already.
        waited = max(self._stalled_seconds, self._last_stalled_seconds, 0.0 if lost else timeout_in_force())
        asking = self._now(waits=True)
        with self._lock:
            self._asking = asking
        diagnosis = self._look(waited, LOOK_BEATS)
        checkpoint = self.last_checkpoint()
        if diagnosis is None or (lost and diagnosis.kind not in ("frozen", "ended")):
            reason = str(error).strip().split("\n")[0]
            return HangError(f"rank {self.rank} lost another rank: {reason}. {checkpoint}", secondary=lost)
        if lost:
            # The launcher on that machine knows better how the process ended; from here this is all there is to know.
            named = " and ".join(beat.name for beat in diagnosis.culprits[:2]) or "another rank"
            return HangError(f"rank {self.rank} lost {named}. {checkpoint}", secondary=True)
        if diagnosis.kind == "ended":
            return HangError(f"{diagnosis.message}. {checkpoint}", secondary=True)
        return HangError(f"{diagnosis.message}. {checkpoint}", pids=self._killable(diagnosis.culprits))

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(self.interval_seconds):
            self._beat()
            due = max(timeout_in_force() + GRACE_SECONDS, self._patient_until)
            if self._stalled_seconds > due and self._asking is None:
                self._handle_stall()

    def _handle_stall(self) -> None:
        long_phase = self.phase in LONG_PHASES
        diagnosis = self._look(self._stalled_seconds, 4 * LOOK_BEATS if long_phase else LOOK_BEATS)
        if self._asking is not None or self._closed.is_set() or self._stalled_seconds == 0:
            return  # the main thread moves again, or handles an error
        saving = self.phase == "checkpoint" or wait_of(self._main) != ""
        ended = diagnosis is not None and diagnosis.kind == "ended"
        if ended and diagnosis is not None:
            saving = saving or not any(beat.left for beat in diagnosis.culprits)  # it has not left yet: it saves
        limit = SAVING_SECONDS if saving else self._long_seconds if long_phase else 0.0
        patient = self._stalled_seconds < limit
        if diagnosis is not None and (diagnosis.kind == "moving" or (patient and diagnosis.kind != "frozen")):
            self._patient_until = self._stalled_seconds + AGAIN_SECONDS
            return
        message = diagnosis.message if diagnosis is not None else f"rank {self.rank} hangs {self._now().at}"
        culprits = diagnosis.culprits if diagnosis is not None and not ended else ()
        error = HangError(f"{message}. {self.last_checkpoint()}", pids=self._killable(culprits))
        self._leave("done")
        self._on_stall(error)

    def _beat(self, left: str = "") -> None:
        beat = self._now(left=left)
        assert self._store is not None
        with contextlib.suppress(RuntimeError, OSError):  # a lost store is handled by readers
            self._store.set(_key(self.rank), beat.to_json())

    def _now(self, *, waits: bool | None = None, left: str = "") -> Beat:
        """Where this rank is; counts a beat."""
        stack = _stack(sys._current_frames().get(self._main or 0))
        waits_for = wait_of(self._main)
        with self._lock:
            seen = (self._position, *stack.seen)
            if seen != self._seen:
                self._seen, self._last_stalled_seconds = seen, self._stalled_seconds
                self._stalled_seconds = self._patient_until = 0.0
                self._moves += 1
            else:
                self._stalled_seconds += self.interval_seconds
            self._count += 1
            fixed = self._asking
            return Beat(
                rank=self.rank,
                pid=os.getpid(),
                host=self._host,
                count=self._count,
                moves=self._moves if fixed is None else fixed.moves,
                position=self._position,
                step=self.step,
                phase=self.phase,
                place=stack.place if fixed is None else fixed.place,
                waits=(stack.in_collective if waits is None else waits) if fixed is None else fixed.waits,
                left=left,
                waits_for=waits_for if fixed is None else fixed.waits_for,
            )

    def _leave(self, how: str) -> None:
        """Sends the last beat, so that the silence after it is not taken for a hang."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=self.interval_seconds + 6)
        self._beat(left=how)

    # ---- looking at the others -----------------------------------------------------------------------------------

    def _look(self, waited: float, num_beats: int) -> Diagnosis | None:
        """The diagnosis from two snapshots `num_beats` apart, or None if the store does not answer."""
        try:
            first = self._read()
            for _ in range(num_beats):
                if threading.current_thread() is self._thread:
                    self._beat()
                time.sleep(self.interval_seconds)
            second = self._read()
        except (RuntimeError, OSError, ValueError, TypeError):
            return None
        return diagnose(first, second, self.num_ranks, self.rank, waited)

    def _read(self) -> dict[int, Beat]:
        assert self._store is not None
        keys = {rank: _key(rank) for rank in range(self.num_ranks)}
        if self._store.has_extended_api() and self._store.check(list(keys.values())):
            texts = dict(zip(keys, self._store.multi_get(list(keys.values())), strict=True))
        else:
            texts = {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        beats = {rank: Beat.from_json(text) for rank, text in texts.items()}
        return {**beats, self.rank: self._now()}

    def _killable(self, culprits: Sequence[Beat]) -> list[int]:
        """Pids of culprits that are ranks of this launch on this machine."""
        here = [beat.pid for beat in culprits if beat.host == self._host and beat.pid != os.getpid()]
        return [pid for pid in here if _parent(pid) == os.getppid()]


def give_up(report: ExitReport, error: HangError) -> None:
    """Ends this process on behalf of a stalled main thread.

    The disk or the reader of our output may be what hangs, so the process exits whether or not the message gets out.
    """
    last_resort = threading.Timer(10, os._exit, [process_status(FAILED)])
    last_resort.daemon = True
    last_resort.start()
    report.write(FAILED, str(error), secondary=error.secondary)
    end_processes(error.pids)
    say(f"error: {error}")
    os._exit(process_status(FAILED))


def _key(rank: int) -> str:
    return f"titan_growth/heartbeat/{rank}"


def _parent(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class _Stack:
    seen: tuple[int, ...]
    """Changes when the thread moves."""
    place: str
    """The innermost function of this package on the stack."""
    in_collective: bool


def _stack(frame: FrameType | None) -> _Stack:
    """What a thread's stack shows."""
    seen: list[int] = []
    place, in_collective = "", False
    depth = 0
    while frame is not None:
        code = frame.f_code
        seen += (id(code), frame.f_lasti)
        # Collectives are C++ under a few wrappers. A pipeline schedule matches too, but computes in deeper frames.
        if depth < 4 and _COLLECTIVES in code.co_filename and (depth == 0 or "c10d" in code.co_filename):
            in_collective = True
        if not place and code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__:
            place = f"{code.co_name} of {code.co_filename[len(_PACKAGE) :]}"
        frame, depth = frame.f_back, depth + 1
    return _Stack(tuple(seen), place, in_collective)
