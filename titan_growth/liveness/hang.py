"""Who is to blame for a hang: a diagnosis from what all ranks wrote down, looked at twice.

A rank that waits in a collective knows only that another did not come. The beats (`liveness.heartbeat`) tell which:
ranks pass the same marks in the same order, so the one that has passed fewer is behind; and a rank whose beats do not
count on is frozen or gone. Only counters are compared, never clocks, which differ between machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from titan_growth.liveness.waits import LAST_SAVE
from titan_growth.tools.errors import TitanGrowthError

LONG_PHASES = ("validation", "checkpoint", "growth")
"""Phases in which ranks may be far apart without anything being wrong."""
NAMED = 4
"""Ranks that a message lists; of more it gives the number."""


class HangError(TitanGrowthError):
    """A collective that failed, or never ended, explained by what the other ranks were doing.

    Attributes:
        secondary: only the consequence of another rank's end, which that rank or its launcher tells better.
        pids: processes on this machine that hang and cannot save any more; to be ended once the message is out.
    """

    def __init__(self, message: str, *, secondary: bool = False, pids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.secondary = secondary
        self.pids = tuple(pids)


@dataclass(frozen=True)
class Beat:
    """What a rank last wrote down."""

    rank: int
    pid: int
    host: str
    count: int
    """Beats so far: an answering process counts on, whatever its main thread does."""
    moves: int
    """Beats at which the main thread was found elsewhere than before."""
    position: int
    """Marks that the main thread has passed: comparable between ranks."""
    step: int
    """The step it is working on; 0 before training."""
    phase: str
    place: str
    """The innermost function of this package that it is in."""
    waits: bool
    """It is inside a collective, as far as its stack shows."""
    left: str = ""
    """Why it beats no more: "done" (in good order, or because it gave up on others) or "failed"."""
    waits_for: str = ""
    """What else than a collective it waits for, as far as that is marked (`liveness.waits`)."""

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
    """Which ranks are to blame, and in what words."""

    kind: str
    """frozen, ended, behind, none, or moving: somebody still gets on, so nothing hangs for good."""
    culprits: tuple[Beat, ...]
    message: str


def diagnose(
    first: Mapping[int, Beat], second: Mapping[int, Beat], num_ranks: int, mine: int, waited: float
) -> Diagnosis:
    """The diagnosis of one rank.

    Args:
        first, second: the beats of all ranks by rank, seconds apart; a rank that never wrote is missing.
        mine: the rank that asks, which waits for others or hangs itself.
        waited: seconds for which it has not got on.
    """
    for_so_long = f"for {waited:.0f} s"
    there = [beat for beat in second.values() if not beat.left]
    frozen = [beat for beat in there if beat.rank in first and first[beat.rank].count == beat.count]
    missing = [rank for rank in range(num_ranks) if rank not in second]
    if frozen:
        has = "have" if len(frozen) > 1 else "has"
        where = _stopped(frozen)
        message = f"{_names(frozen)} {has} not answered {for_so_long}, {where}; the other ranks waited in a collective"
        return Diagnosis("frozen", tuple(frozen), message)
    if missing:
        ranks = ", ".join(map(str, missing[:NAMED]))
        message = f"rank{'s' if len(missing) > 1 else ''} {ranks} never answered; the other ranks waited {for_so_long}"
        return Diagnosis("frozen", (), message)
    ended = [beat for beat in second.values() if beat.left == "failed" or beat.waits_for == LAST_SAVE]
    if ended and second[mine].waits_for != LAST_SAVE:
        return Diagnosis("ended", tuple(ended), f"{_names(ended)} ended {ended[0].at}; its own message tells why")
    moving = [beat for beat in there if beat.rank in first and first[beat.rank].moves != beat.moves]
    patient = not second[mine].waits or second[mine].phase in LONG_PHASES
    if patient and any(beat.rank != mine for beat in moving):
        return Diagnosis("moving", (), "the others get on")
    lowest = min(beat.position for beat in second.values())
    # Also one that has given up before this rank did: it is still the one that the others waited for.
    hindmost = [beat for beat in second.values() if beat.position == lowest]
    busy = [beat for beat in hindmost if not beat.waits]
    all_level = all(beat.position == lowest for beat in second.values())
    if hindmost and (not all_level or (busy and len(busy) < len(second))):
        behind = busy or hindmost
        is_ = "are" if len(behind) > 1 else "is"
        message = (
            f"{_names(behind)} {is_} behind: {behind[0].at} while the other ranks have waited for it {for_so_long}"
        )
        return Diagnosis("behind", tuple(behind), message)
    message = (
        f"nothing has moved {for_so_long} {second[mine].at}, and no rank is behind: all {num_ranks} answer and have "
        "come to the same place. Look at the network and the devices"
    )
    return Diagnosis("none", (), message)


def _names(beats: Sequence[Beat]) -> str:
    names = [beat.name for beat in beats[:NAMED]]
    if len(beats) > NAMED:
        return f"{', '.join(names)} and {len(beats) - NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _stopped(beats: Sequence[Beat]) -> str:
    beat = min(beats, key=lambda one: one.position)
    return f"stopped at step {beat.step} ({beat.phase})" if beat.step else "stopped before the first step"


def end_processes(pids: Sequence[int]) -> None:
    """Ends ranks that hang, once the message is out.

    A stopped process obeys nothing gentler, and torchrun would wait 30 s before it does the same.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
