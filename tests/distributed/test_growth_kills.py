"""SIGKILL at every point of a growth that also changes the mesh: the resumed run is bitwise the unbroken one.

One rank is killed and the others with it, as by a launcher; the next start resumes in the same folder and is killed at
the next point. In the end the metrics must equal, except for timings, those of an unbroken run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.runs import make_recipe, read_metrics, train, without_timings

COMMON: dict[str, Any] = {
    "model__n_layers": 4,
    "training__steps": 7,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "validation__enable": True,
    "validation__freq": 3,
    "validation__local_batch_size": 4,
    "debug__log_batch_hash": True,
    "growth__stages__0__at": "3 steps",
    "growth__stages__0__factor": 2,
    "growth__stages__0__optimizer_state": "asymmetric",
    "growth__stages__0__lr_policy": "rewarm_new",
    "growth__stages__0__warmup_steps": 2,
}
MESHES: dict[int, dict[str, Any]] = {
    4: {
        "parallelism__pipeline_parallel_degree": 2,
        "parallelism__pipeline_parallel_microbatch_size": 1,
        "training__local_batch_size": 4,
        "growth__stages__0__parallelism__tensor_parallel_degree": 2,
    },
    8: {
        "training__local_batch_size": 1,
        "growth__stages__0__local_batch_size": 4,
        "growth__stages__0__parallelism__pipeline_parallel_degree": 2,
        "growth__stages__0__parallelism__pipeline_parallel_microbatch_size": 1,
        "growth__stages__0__parallelism__tensor_parallel_degree": 2,
    },
}
"""By number of ranks: pp 2 x fsdp 2 -> fsdp 2 x tp 2, and fsdp 8 -> pp 2 x fsdp 2 x tp 2."""

GROWN_AT = 3


def killed_at(rank: int, num_ranks: int, recipe: Any, point: str) -> None:
    """Trains; one rank is killed at a point, a different rank at each."""
    from titan_growth import grower as growing
    from titan_growth.checkpoint import saving
    from titan_growth.growth import apply as carry_out
    from titan_growth.growth import read, verify
    from titan_growth.run.state import RunState
    from titan_growth.trainer import Trainer

    # DCP finishes a checkpoint on rank 0 alone.
    victim = 0 if point == "shards half written" else sum(map(ord, point)) % num_ranks

    def kill(*_: Any, **__: Any) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True, after_calls: int = 0) -> None:
        original, calls = getattr(owner, name), [0]

        def patched(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                calls[0] += 1
                if calls[0] > after_calls and (rank == victim or after_calls == 0):
                    kill()
            return original(*args, **kwargs)

        setattr(owner, name, patched)

    def at_step(step: int) -> Callable[..., bool]:
        return lambda trainer, *_: trainer.progress.step == step

    points: dict[str, Callable[[], None]] = {
        "before the save": lambda: before(Trainer, "save", at_step(GROWN_AT)),
        "shards half written": lambda: before(saving.ShardWriter, "finish", lambda *_: current(Trainer) == GROWN_AT),
        "before the commit": lambda: before(saving, "gather_objects", lambda files, *_: isinstance(files, dict), 0),
        "saved, not grown": lambda: before(Trainer, "grow"),
        "before the build": lambda: before(growing, "PhaseRuntime"),
        "before the read": lambda: before(carry_out, "read_grown"),
        "in the read": lambda: before(read, "place", after_calls=9),
        "read, not finished": lambda: before(read, "finish", after_calls=3),
        "before the verification": lambda: before(carry_out, "verify_growth"),
        "in the verification": lambda: before(verify, "_compare", after_calls=5),
        "before the loss after": lambda: before(growing, "check_preserved"),
        "grown, not trained": lambda: before(Trainer, "agree", lambda trainer, *_: len(trainer.lineage.events) == 1),
        "in the first step": lambda: before(RunState, "advance", at_step(GROWN_AT)),
        "after the first step": lambda: before(Trainer, "after_step", at_step(GROWN_AT + 1)),
        "in the first save after": lambda: before(saving, "file_entry", lambda *_: current(Trainer) == GROWN_AT + 1),
        "after the first save": lambda: before(Trainer, "agree", at_step(GROWN_AT + 1)),
    }
    remember(Trainer)
    points[point]()
    train(rank, num_ranks, recipe)


def remember(kind: Any) -> None:
    """Makes this process's trainer report its step to `current`."""
    original = kind.after_step

    def patched(self: Any, *args: Any) -> Any:
        kind.current_step = self.progress.step
        return original(self, *args)

    kind.after_step = patched
    kind.current_step = 0


def current(kind: Any) -> int:
    return int(kind.current_step)


POINTS = (
    "before the save",
    "shards half written",
    "before the commit",
    "saved, not grown",
    "before the build",
    "before the read",
    "in the read",
    "read, not finished",
    "before the verification",
    "in the verification",
    "before the loss after",
    "grown, not trained",
    "in the first step",
    "after the first step",
    "in the first save after",
    "after the first save",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", MESHES)
def test_killed_at_sixteen_points_of_a_growth(num_ranks: int, tmp_path: Path) -> None:
    settings = {**COMMON, **MESHES[num_ranks]}
    run_ranks(train, num_ranks, num_ranks, make_recipe(tmp_path / "whole", **settings), timeout_seconds=180)
    expected = without_timings(read_metrics(tmp_path / "whole"))
    recipe = make_recipe(tmp_path / "broken", **settings)
    for point in POINTS:
        with pytest.raises(AssertionError):
            run_ranks(killed_at, num_ranks, num_ranks, recipe, point, timeout_seconds=180)
        assert not (tmp_path / "broken" / "checkpoint" / "step-7").exists(), f"'{point}' was never reached"
    run_ranks(train, num_ranks, num_ranks, recipe, timeout_seconds=180)
    assert without_timings(read_metrics(tmp_path / "broken")) == expected
    assert [line["num_layers"] for line in expected if "num_layers" in line] == [2, 2, 2, 4, 4, 4, 4]
