"""Which rank causes a hang: a diagnosis from two snapshots of all ranks' beats.

A rank waiting in a collective only knows that another did not join. The beats (`liveness.heartbeat`) show which: ranks
pass the same marks in the same order, so the one with fewer marks is behind, and a rank whose beat counter stands still
is frozen or gone. Only counters are compared, never clocks, which differ between machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from titan_growth.liveness.waits import LAST_SAVE
from titan_growth.tools.errors import TitanGrowthError

LONG_PHASES = ("validation", "checkpoint", "growth")
"""Phases in which ranks may legitimately be far apart."""
NAMED = 4
"""Ranks that a message names; the rest are counted."""


class HangError(TitanGrowthError):
    """A collective that failed or never ended, explained by what the other ranks were doing.

    Attributes:
        secondary: only the consequence of another rank's end, which that rank or its launcher explains better.
        pids: processes on this machine that hang and can no longer save; to be killed once the message is out.
    """

    def __init__(self, message: str, *, secondary: bool = False, pids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.secondary = secondary
        self.pids = tuple(pids)


@dataclass(frozen=True)
class Beat:
    """The last published state of a rank."""

    rank: int
    pid: int
    host: str
    count: int
    """Beats so far; a responding process keeps counting, whatever its main thread does."""
    moves: int
    """Beats at which the main thread had moved."""
    position: int
    """Marks the main thread has passed; comparable between ranks."""
    step: int
    """The current step; 0 before training."""
    phase: str
    place: str
    """The innermost function of this package on the stack."""
    waits: bool
    """Inside a collective, judging by the stack."""
    left: str = ""
    """Why it stopped beating: "done" (finished, or gave up on others) or "failed"."""
    waits_for: str = ""
    """What it waits for other than a collective, if marked (`liveness.waits`)."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """`rank 2 (pid 123 on node-a)`."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def at(self) -> str:
        """`at step 17 (data, in next_batch of data/loader.py)`."""
        place = f", in {self.place}" if self.place else ""
        return f"at step {self.step} ({self.phase}{place})" if self.step else f"before the first step{place}"


@dataclass(frozen=True)
class Diagnosis:
    """Which ranks cause a hang, with a message."""

    kind: str
    """frozen, ended, behind, none, or moving: another rank still makes progress, so this is not a hang."""
    culprits: tuple[Beat, ...]
    message: str


def diagnose(
    first: Mapping[int, Beat], second: Mapping[int, Beat], num_ranks: int, own_rank: int, waited: float
) -> Diagnosis:
    """One rank's diagnosis.

    Args:
        first, second: all ranks' beats by rank, seconds apart; a rank that never published one is missing.
        own_rank: the rank that asks, which waits for others or hangs itself.
        waited: seconds without progress.
    """
    own = second[own_rank]
    duration = f"for {waited:.0f} s"
    running = [beat for beat in second.values() if not beat.left]
    frozen = [beat for beat in running if beat.rank in first and first[beat.rank].count == beat.count]
    missing = [rank for rank in range(num_ranks) if rank not in second]
    if frozen:
        has = "have" if len(frozen) > 1 else "has"
        where = replace(min(frozen, key=lambda beat: beat.position), place="").at
        message = (
            f"{_names(frozen)} {has} not answered {duration}, stopped {where}; the other ranks waited in a collective"
        )
        return Diagnosis("frozen", tuple(frozen), message)
    if missing:
        ranks = ", ".join(map(str, missing[:NAMED]))
        message = f"rank{'s' if len(missing) > 1 else ''} {ranks} never answered; the other ranks waited {duration}"
        return Diagnosis("frozen", (), message)
    ended = [beat for beat in second.values() if beat.left == "failed" or beat.waits_for == LAST_SAVE]
    if ended and own.waits_for != LAST_SAVE:
        return Diagnosis("ended", tuple(ended), f"{_names(ended)} ended {ended[0].at}; see its own message")
    moving = [beat for beat in running if beat.rank in first and first[beat.rank].moves != beat.moves]
    patient = not own.waits or own.phase in LONG_PHASES
    if patient and any(beat.rank != own_rank for beat in moving):
        return Diagnosis("moving", (), "other ranks make progress")
    if behind := _behind(list(second.values())):
        is_ = "are" if len(behind) > 1 else "is"
        message = f"{_names(behind)} {is_} behind: {behind[0].at} while the other ranks have waited for it {duration}"
        return Diagnosis("behind", tuple(behind), message)
    message = (
        f"no progress {duration} {own.at}, and no rank is behind: all {num_ranks} respond, from the same place. "
        "Check the network and the devices"
    )
    return Diagnosis("none", (), message)


def _behind(beats: Sequence[Beat]) -> list[Beat]:
    """The ranks that the others wait for, if the beats tell them apart."""
    lowest = min(beat.position for beat in beats)
    # This includes a rank that gave up earlier: the others waited for it all the same.
    last = [beat for beat in beats if beat.position == lowest]
    busy = [beat for beat in last if not beat.waits]
    if len(last) < len(beats):
        return busy or last
    return busy if len(busy) < len(beats) else []


def _names(beats: Sequence[Beat]) -> str:
    names = [beat.name for beat in beats[:NAMED]]
    if len(beats) > NAMED:
        return f"{', '.join(names)} and {len(beats) - NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def end_processes(pids: Sequence[int]) -> None:
    """Kills ranks that hang, once the message is out.

    A stopped process reacts to nothing but SIGKILL, and torchrun would wait 30 s before sending it.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
