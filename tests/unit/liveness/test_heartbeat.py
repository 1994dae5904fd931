"""Diagnosis of hangs, on constructed beats and between real processes."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.harness import run_ranks
from titan_growth.liveness.hang import Beat, Diagnosis, HangError, diagnose
from titan_growth.liveness.waits import LAST_SAVE, STORAGE, waiting_for
from titan_growth.tools import collectives as distributed


def beats(num_ranks: int = 4, **changed: dict[str, Any]) -> dict[int, Beat]:
    """Ranks waiting at the same place; changes are given as rank2={...}."""
    level = Beat(0, 100, "node-a", 50, 20, 60, 17, "train", "all of engine.py", True)
    ranks = {rank: replace(level, rank=rank, pid=100 + rank) for rank in range(num_ranks)}
    return {rank: replace(beat, **changed.get(f"rank{rank}", {})) for rank, beat in ranks.items()}


def later(first: dict[int, Beat], but: tuple[int, ...] = (), moved: tuple[int, ...] = ()) -> dict[int, Beat]:
    """The same ranks four beats later, except those in `but`, which do not beat."""
    return {
        rank: replace(beat, count=beat.count + 4 * (rank not in but), moves=beat.moves + 4 * (rank in moved))
        for rank, beat in first.items()
    }


def diagnosis(first: dict[int, Beat], own_rank: int = 0, **of_later: Any) -> Diagnosis:
    return diagnose(first, later(first, **of_later), len(first), own_rank, 30.4)


def test_a_rank_without_a_new_beat_is_frozen() -> None:
    found = diagnosis(beats(), but=(2,))
    assert found.kind == "frozen"
    assert found.message == (
        "rank 2 (pid 102 on node-a) has not answered for 30 s, stopped at step 17 (train); "
        "the other ranks waited in a collective"
    )
    many = diagnosis(beats(9), but=(2, 3, 4, 5, 6, 7))
    assert "rank 5 (pid 105 on node-a) and 2 more have not answered" in many.message


def test_a_rank_that_left_is_not_frozen() -> None:
    """The first rank to give up stops beating; the others must not blame it."""
    ranks = beats(rank1={"left": "done"})
    assert diagnosis(ranks, but=(1, 2)).culprits == (later(ranks, but=(1, 2))[2],)
    failed = diagnosis(beats(rank1={"left": "failed"}), but=(1,))
    assert failed.kind == "ended"
    assert "rank 1 (pid 101 on node-a) ended at step 17" in failed.message


def test_a_rank_that_waits_for_its_last_save_has_ended() -> None:
    leaving = {"position": 58, "place": "close of anywhere.py", "waits": False, "waits_for": LAST_SAVE}
    found = diagnosis(beats(rank1=leaving))
    assert found.kind == "ended"
    assert found.message == (
        "rank 1 (pid 101 on node-a) ended at step 17 (train, in close of anywhere.py); see its own message"
    )
    assert diagnosis(beats(rank1=leaving), own_rank=1).kind == "behind"  # it asks for itself
    assert diagnosis(beats(rank1={**leaving, "waits_for": STORAGE})).kind == "behind"


def test_a_rank_with_fewer_marks_is_behind() -> None:
    late = {"position": 58, "phase": "data", "place": "next_batch of data/loader.py", "waits": False}
    found = diagnosis(beats(rank3=late))
    assert found.kind == "behind"
    assert found.message == (
        "rank 3 (pid 103 on node-a) is behind: at step 17 (data, in next_batch of data/loader.py) "
        "while the other ranks have waited for it for 30 s"
    )
    # A rank that is late only because it waits for the late one is not to blame.
    assert [beat.rank for beat in diagnosis(beats(rank3=late, rank2={"position": 58})).culprits] == [3]


def test_of_level_ranks_the_one_outside_the_collective_is_behind() -> None:
    assert [beat.rank for beat in diagnosis(beats(rank0={"waits": False}), own_rank=1).culprits] == [0]


def test_nobody_is_blamed_without_a_reason() -> None:
    found = diagnosis(beats())
    assert found.kind == "none"
    assert found.culprits == ()
    assert "no rank is behind: all 4 respond" in found.message
    unseen = {f"rank{rank}": {"waits": False} for rank in range(4)}  # waits on the device do not show in stacks
    assert diagnosis(beats(**unseen)).kind == "none"


def test_a_slow_step_is_no_hang_while_others_progress() -> None:
    busy = beats(rank0={"waits": False})
    assert diagnosis(busy, moved=(2,)).kind == "moving"


def test_a_rank_that_never_wrote_is_named() -> None:
    ranks = beats()
    there = {rank: beat for rank, beat in ranks.items() if rank != 3}
    assert diagnose(there, later(there), 4, 0, 5.0).message == "rank 3 never answered; the other ranks waited for 5 s"


def heartbeat(**settings: Any) -> Any:
    from titan_growth.liveness.heartbeat import Heartbeat

    def unexpected(error: HangError) -> None:
        raise AssertionError(str(error))

    settings = {"long_seconds": 60, "on_stall": unexpected, "interval_seconds": 0.1, **settings}
    made = Heartbeat.of_process_group(**settings)
    made.last_checkpoint = lambda: "The last checkpoint is step-10; run the same command again"
    return made


def wait_for_a_late_rank(rank: int) -> str:
    """Rank 1 comes too late to a collective, and the others' time limit is short."""
    import torch
    import torch.distributed as dist

    pulse = heartbeat()
    try:
        with pulse:
            pulse.mark("train", 3)
            distributed.set_timeout(1)
            if rank == 1:
                time.sleep(2.5)
                return "late"
            pulse.mark("train", 4)
            dist.all_reduce(torch.ones(1))
    except HangError as error:
        return f"{error}{' (secondary)' * error.secondary}"
    finally:
        distributed.set_timeout(60)
    raise AssertionError("the collective went through")


def leave_afterwards(rank: int) -> None:
    """Skips the harness's last barrier, which would fail on the broken group."""
    import torch.distributed as dist

    dist.barrier = lambda: None
    return wait_for_a_late_rank(rank)  # type: ignore[return-value]


def test_a_collective_that_times_out_names_the_late_rank() -> None:
    messages = run_ranks(leave_afterwards, 3)
    assert messages[1] == "late"
    for rank in (0, 2):
        assert messages[rank].startswith("rank 1 (pid ")
        assert "is behind: at step 3 (train" in messages[rank]
        assert messages[rank].endswith("The last checkpoint is step-10; run the same command again")


def stand_still(rank: int) -> str:
    """No collective raises, as with NCCL: the rank's own thread notices."""
    from titan_growth.liveness import heartbeat as module

    module.GRACE_SECONDS = 0.2
    messages: list[str] = []
    pulse = heartbeat(on_stall=lambda error: messages.append(str(error)))
    distributed.set_timeout(1)
    with pulse:
        pulse.mark("train", 5)
        if rank == 0:
            pulse.mark("data", 6)
        time.sleep(2.2)
    distributed.set_timeout(60)
    return " ".join(messages)


def test_a_main_thread_that_does_not_move_is_noticed_without_a_collective() -> None:
    for message in run_ranks(stand_still, 2):
        assert "rank 1 (pid " in message
        assert "is behind: at step 5 (train" in message


def wait_for_storage(rank: int) -> list[str]:
    """Both ranks stand still beyond the time limit, in a slow read that is marked or not."""
    from titan_growth.liveness import heartbeat as module

    module.GRACE_SECONDS = 0.2
    messages: list[str] = []
    distributed.set_timeout(1)
    for mark in (waiting_for(STORAGE), contextlib.nullcontext()):
        with heartbeat(on_stall=lambda error: messages.append(str(error))) as pulse, mark:
            pulse.mark("train", 5)
            time.sleep(3.5)
        messages.append("done")
    distributed.set_timeout(60)
    return messages


def test_a_marked_wait_for_storage_is_no_stall() -> None:
    for first, *others in run_ranks(wait_for_storage, 2):
        assert first == "done"
        assert len(others) == 2


def pause(rank: int) -> int:
    """A pause has the long limit; steps that progress are never diagnosed."""
    from titan_growth.liveness import heartbeat as module

    module.GRACE_SECONDS = 0.2
    pulse = heartbeat()
    distributed.set_timeout(1)
    with pulse:
        pulse.mark("checkpoint", 5)
        time.sleep(1.6)
        for step in range(3):
            pulse.mark("train", step)
            time.sleep(0.5)
    distributed.set_timeout(60)
    return pulse._count


@pytest.mark.slow
def test_pauses_may_be_long_and_slow_steps_are_no_stall() -> None:
    assert min(run_ranks(pause, 2)) > 10


def alone(rank: int) -> bool:
    with heartbeat() as pulse:
        return pulse._store is None and not pulse._thread.is_alive()


def test_one_rank_beats_for_nobody() -> None:
    assert run_ranks(alone, 1) == [True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[gloo] Timed out waiting 5000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),
        ("DataLoader timed out after 5 seconds", False),
    ],
)
def test_only_the_time_limit_of_a_collective_counts(text: str, expected: bool) -> None:
    from titan_growth.liveness.exit_report import timed_out

    assert timed_out(RuntimeError(text)) is expected
