"""Background saves: the same checkpoints, one at a time, and a failed one is never taken for valid."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, train, trainer_of, without_timings
from titan_growth.checkpoint import saving
from titan_growth.checkpoint.folder import open_step
from titan_growth.checkpoint.steps import committed_steps
from titan_growth.checkpoint.writer import ShardWriter
from titan_growth.tools.errors import CheckpointError

RUN: dict[str, Any] = {
    "training__steps": 8,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "checkpoint__keep_latest_k": 0,
    "validation__enable": True,
    "validation__freq": 3,
    "validation__local_batch_size": 4,
    "debug__log_batch_hash": True,
}
GROWING = {**RUN, "growth__stages": '[{at = "4 steps", operator = "stack", factor = 2}]'}


def shards_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Step -> sizes and checksums of its tensor files."""
    found = committed_steps(folder / "checkpoint")
    assert not found.refused
    return {
        one.path.name: {name: entry for name, entry in one.manifest.files.items() if name.endswith(".distcp")}
        for one in found.usable
    }


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, GROWING),
        pytest.param(2, GROWING, marks=pytest.mark.slow),
        pytest.param(
            8,
            {**RUN, "parallelism__pipeline_parallel_degree": 2, "parallelism__tensor_parallel_degree": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {**RUN, "parallelism__data_parallel_replicate_degree": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_checkpoints_are_those_of_saves_that_are_waited_for(
    num_ranks: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Bitwise, at every step, although training continues while they are written."""
    whole = make_recipe(tmp_path / "sync", **settings)
    run_ranks(train, num_ranks, num_ranks, whole, timeout_seconds=250)
    recipe = make_recipe(tmp_path / "async", **settings, checkpoint__async_mode="async")
    run_ranks(train_beside_saves, num_ranks, num_ranks, recipe, timeout_seconds=250)
    assert shards_of(tmp_path / "async") == shards_of(tmp_path / "sync")
    assert without_timings(read_metrics(tmp_path / "async")) == without_timings(read_metrics(tmp_path / "sync"))


def train_beside_saves(rank: int, num_ranks: int, recipe: Any) -> tuple[set[int], int]:
    """Trains with saves that outlast a step; returns (steps beside a save, maximum concurrent saves)."""
    write, under_way, most = ShardWriter.write_data, [0], [0]
    beside: set[int] = set()

    def slow(self: ShardWriter, *args: Any) -> Any:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        step = int(self.folder.name.removeprefix("step-"))
        # Two steps later, unless the next save, a growth or the end waits for this one.
        until = time.monotonic() + 1
        while trainer.progress.step < step + 2 and time.monotonic() < until + 20 * (trainer.progress.step > step):
            time.sleep(0.001)
        try:
            return write(self, *args)
        finally:
            under_way[0] -= 1

    ShardWriter.write_data = slow  # type: ignore[method-assign]
    try:
        with trainer_of(recipe, num_ranks) as trainer:
            advance = trainer.state.advance

            def watched(*args: Any) -> None:
                thread = trainer.checkpointer.saver._thread
                if thread is not None and thread.is_alive():
                    beside.add(trainer.progress.step + 1)
                advance(*args)

            trainer.state.advance = watched  # type: ignore[method-assign]
            assert trainer.fit()
    finally:
        ShardWriter.write_data = write  # type: ignore[method-assign]
    return beside, most[0]


def test_training_goes_on_beside_one_save_and_never_two(tmp_path: Path) -> None:
    settings = {**RUN, "training__steps": 12, "checkpoint__interval": 6}
    recipe = make_recipe(tmp_path / "run", **settings, checkpoint__async_mode="async")
    for beside, most in run_ranks(train_beside_saves, 2, 2, recipe):
        assert beside >= {7, 8}, "no step was made during a save"
        assert most == 1
    assert shards_of(tmp_path / "run").keys() == {"step-6", "step-12"}


def failing(rank: int, num_ranks: int, recipe: Any, victim: int, step: int, times: int) -> tuple[str, int, list[str]]:
    """Trains while a step's writes fail a number of times on one rank; (error raised, step, lines logged)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_growth").addHandler(handler)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
    left, write = [times], ShardWriter.write_data
    saving.time.sleep = lambda seconds: None  # type: ignore[assignment]

    def full(self: ShardWriter, *args: Any) -> Any:
        if rank == victim and self.folder.name == f"step-{step}" and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", "/disk")
        return write(self, *args)

    ShardWriter.write_data = full  # type: ignore[method-assign]
    with trainer_of(recipe, num_ranks) as trainer:
        try:
            trainer.fit()
        except CheckpointError as error:
            return str(error), trainer.progress.step, lines
        return "", trainer.progress.step, lines


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "async"])
def test_a_failed_write_is_reported_and_tried_again(mode: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", **RUN, checkpoint__async_mode=mode)
    for message, step, lines in run_ranks(failing, 2, 2, recipe, 1, 4, 2):
        assert (message, step) == ("", 8)
        found = [line for line in lines if "was not saved" in line]
        assert len(found) == 2
        assert "step-4 was not saved: No space left on device: /disk" in found[0]
        assert found[0].endswith("Trying again in 1 s")
    assert shards_of(tmp_path / "run").keys() == {"step-2", "step-4", "step-6", "step-8"}


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "async"])
def test_a_save_that_fails_for_good_ends_the_run_on_all_ranks_at_one_step(mode: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", **RUN, checkpoint__async_mode=mode)
    ends = run_ranks(failing, 2, 2, recipe, 1, 4, 3)
    assert all("step-4 was not saved: No space left on device: /disk" in message for message, _, _ in ends)
    assert ends[0][1] == ends[1][1]
    assert 4 <= ends[0][1] <= 6
    assert shards_of(tmp_path / "run").keys() == {"step-2"}
    assert not (tmp_path / "run" / "checkpoint" / "step-4").exists()


def killed_while_writing(rank: int, num_ranks: int, recipe: Any, step: int) -> None:
    """Dies in a step's background save, once training is one step further."""
    commit = saving.write_manifest

    def die_later(path: Path, *args: Any) -> None:
        if path.name == f"step-{step}":
            while trainer.progress.step <= step:
                time.sleep(0.005)
            os._exit(0)
        commit(path, *args)

    saving.write_manifest = die_later
    with trainer_of(recipe, num_ranks) as trainer:
        trainer.fit()


def test_killed_beside_a_background_save_it_resumes_bitwise(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    settings = {**GROWING, "checkpoint__async_mode": "async"}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **settings))
    broken = make_recipe(tmp_path / "broken", **settings)
    for step in (2, 6):
        with pytest.raises(AssertionError):
            run_ranks(killed_while_writing, 1, 1, broken, step)
        assert open_step(tmp_path / "broken" / "checkpoint" / f"step-{step}") is None
    run_ranks(train, 1, 1, broken)
    assert without_timings(read_metrics(tmp_path / "broken")) == without_timings(read_metrics(tmp_path / "whole"))
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")


def test_permanent_checkpoints_stay(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """One every `permanent_interval` steps is kept, besides the latest k."""
    settings = {**RUN, "training__steps": 11, "checkpoint__keep_latest_k": 2, "checkpoint__permanent_interval": 3}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings))
    kept = [step.step for step in committed_steps(tmp_path / "run" / "checkpoint").usable]
    assert kept == [11, 10, 9, 6, 3]
