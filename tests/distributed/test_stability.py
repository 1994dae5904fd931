"""Bad steps in real runs: NaN in the loss and in one rank's gradient, spikes; skipped and rolled back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, run_of, train, without_timings
from titan_growth.tools.errors import TitanGrowthError

SAVING: dict[str, Any] = {
    "training__steps": 8,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "debug__log_batch_hash": True,
    "lr_scheduler__decay_ratio": 0.0,
}
WATCHING = {"stability__spike_window": 8, "stability__spike_sigmas": 200.0}
"""Of a handful of early steps two may be nearly alike, and anything is many deviations away from them."""
GROWING = {"growth__stages": '[{at = "4 steps", operator = "stack", factor = 2, lr_policy = "rewarm_new"}]'}


def session(rank: int, recipe: Any, faults: list[dict[str, Any]], die_at: str = "") -> str:
    """One rank of a run in the real session, which rolls back; the error that ended it, if any.

    A fault hits the global batch that ends at a given cursor, each time it is trained on. It happens on one rank:
    "loss": NaN or a factor on its loss; "gradient": NaN in one of its gradients.
    """
    from titan_growth.checkpoint.manager import CheckpointManager
    from titan_growth.engine.engine import Engine
    from titan_growth.engine.optimizer import Optimizer
    from titan_growth.metrics import observers
    from titan_growth.trainer import Trainer

    now: list[dict[str, Any]] = []

    def watched(self: Any, runtime: Any, batch: Any, original: Any = Trainer.agree) -> Any:
        now[:] = [fault for fault in faults if fault["cursor"] == runtime.data.cursor and fault.get("rank", 1) == rank]
        return original(self, runtime, batch)

    def loss_sum(self: Any, batch: Any, original: Any = Engine._loss_sum) -> Any:
        loss = original(self, batch)
        for fault in now:
            loss = loss * fault.get("loss", 1.0)
        return loss

    def clip(self: Any, original: Any = Optimizer.clip) -> Any:
        for fault in now:
            if "gradient" in fault:
                gradient = next(iter(self.parameters.values())).grad
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                local[0] = fault["gradient"]
        now.clear()  # the next forward pass may be that of an evaluation
        return original(self)

    Trainer.agree, Engine._loss_sum, Optimizer.clip = watched, loss_sum, clip  # type: ignore[method-assign]
    if die_at == "rolled back":  # the first start is from scratch (None)
        CheckpointManager.begin = lambda _, step: step and os._exit(0)  # type: ignore[method-assign,assignment]
    observers.peak_flops_per_second = lambda *_: (1e12, "not measured, to save time")
    run = run_of(recipe, torch.distributed.get_world_size())
    try:
        outcome = run.session.run(run.start)
    except TitanGrowthError as error:
        return str(error)
    return "" if outcome.status == 0 else outcome.message


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read_metrics(folder) if "num_layers" in line}


def state_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "checkpoint" / f"step-{step}" / "manifest.json").read_text())["stability"]


def weights_of(folder: Path, step: int) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = folder / "checkpoint" / f"step-{step}"
    dcp_to_torch_save(path, folder / "weights.pt")
    return torch.load(folder / "weights.pt", weights_only=True)


FAULTS = [{"loss": float("nan")}, {"gradient": float("nan")}, {"loss": 1e4}]
NAMES = ["NaN in the data path", "NaN in a gradient", "a spike"]
NAMED = list(zip(FAULTS, NAMES, strict=True))
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=name, marks=[SLOW] * (name != NAMES[1]))
        for fault, name in zip(FAULTS, NAMES, strict=True)
    ],
)
def test_a_skipped_step_leaves_only_its_line(fault: dict[str, Any], tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Weights, moments and counters are unchanged after the bad step; the run continues with the next batch."""
    import torch

    settings = {**SAVING, **WATCHING, "stability__nonfinite": "skip", "stability__spike": "skip"}
    recipe = make_recipe(tmp_path / "run", checkpoint__permanent_interval=1, **settings)
    assert run_ranks(session, 2, recipe, [{"cursor": 5 * 8, **fault}]) == ["", ""]
    lines = steps_of(tmp_path / "run")
    assert list(lines) == list(range(1, 9))
    assert [step for step, line in lines.items() if "skipped" in line] == [5]
    assert ("standard deviations" if fault == FAULTS[2] else "nan") in lines[5]["skipped"]
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "whole", **SAVING))
    whole = steps_of(tmp_path / "whole")
    assert [line["batch_hash"] for line in lines.values()] == [line["batch_hash"] for line in whole.values()]
    assert [line["tokens"] for line in lines.values()] == [line["tokens"] for line in whole.values()]
    before, after = weights_of(tmp_path / "run", 4), weights_of(tmp_path / "run", 5)

    def compare(one: Any, other: Any, name: str) -> None:
        if isinstance(one, dict):
            for key in one:
                compare(one[key], other[key], f"{name}.{key}")
        elif ".rng" not in name:
            assert torch.equal(one, other), name

    compare(before, after, "")
    (event,) = state_of(tmp_path / "run", 8)["events"]
    assert (event["step"], event["action"], event["to_samples"]) == (5, "skip", 40)


@pytest.mark.parametrize(
    ("fault", "more"),
    [
        pytest.param(fault, more, id=f"{name}-{'growing' if more else 'plain'}", marks=[SLOW] * (number != 1))
        for number, (fault, name, more) in enumerate(
            (fault, name, more) for fault, name in NAMED for more in ({}, GROWING)
        )
    ],
)
def test_a_roll_back_continues_past_the_data(
    fault: dict[str, Any], more: dict[str, Any], tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """From the checkpoint of step 4, before the growth if there is one, with the batch after the bad one of step 7."""
    settings = {**SAVING, **more, "checkpoint__interval": 4, "stability__nonfinite": "roll_back"}
    settings |= {**WATCHING, "stability__spike": "roll_back"}
    recipe = make_recipe(tmp_path / "run", **settings)
    assert run_ranks(session, 2, recipe, [{"cursor": 7 * 8, **fault}]) == ["", ""]
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "whole", **{**SAVING, **more, "training__steps": 11}))
    lines, whole = steps_of(tmp_path / "run"), steps_of(tmp_path / "whole")
    assert list(lines) == list(range(1, 9))
    seen = [line["batch_hash"] for line in lines.values()]
    expected = [whole[step]["batch_hash"] for step in (1, 2, 3, 4, 8, 9, 10, 11)]
    assert seen == expected
    assert lines[4]["loss"] == whole[4]["loss"]
    assert not any("skipped" in line for line in lines.values())
    (event,) = state_of(tmp_path / "run", 8)["events"]
    assert (event["step"], event["from_step"], event["from_samples"], event["to_samples"]) == (7, 4, 32, 56)
    if more:
        assert [line["num_layers"] for line in lines.values()] == [2] * 4 + [4] * 4
        lineage = json.loads((tmp_path / "run" / "checkpoint" / "step-8" / "lineage.json").read_text())
        assert [event["step"] for event in lineage["events"]] == [4]


@SLOW
@pytest.mark.parametrize("num_ranks", [2, 1])
def test_a_run_that_dies_after_a_roll_back_skips_the_same_data(num_ranks: int, tmp_path: Path) -> None:
    """Killed after the checkpoint was rewritten; resumed on the same ranks it is bitwise the unbroken run."""
    settings = {**SAVING, **GROWING, "checkpoint__interval": 4, "stability__nonfinite": "roll_back"}
    faults = [{"cursor": 6 * 8, "loss": float("nan"), "rank": 0}]
    lived = make_recipe(tmp_path / "lived", **settings)
    run_ranks(session, 2, lived, faults)
    died = make_recipe(tmp_path / "died", **settings)
    with pytest.raises((AssertionError, FileNotFoundError)):
        run_ranks(session, 2, died, faults, "rolled back")
    assert state_of(tmp_path / "died", 4)["events"][0]["to_samples"] == 48
    assert run_ranks(session, num_ranks, died, faults) == [""] * num_ranks
    ends = [without_timings(read_metrics(tmp_path / name)) for name in ("died", "lived")]
    if num_ranks == 2:
        assert ends[0] == ends[1]
    hashes = [[line.get("batch_hash") for line in end] for end in ends]
    assert hashes[0] == hashes[1]
    assert state_of(tmp_path / "died", 8) == state_of(tmp_path / "lived", 8)


def test_the_limit_holds_over_roll_backs_and_resumes(tmp_path: Path) -> None:
    """Two events are allowed: a skip, a roll-back after a kill; the third ends the run and lists them."""
    settings = {**SAVING, "stability__nonfinite": "skip", "stability__max_events": 2}
    faults = [{"cursor": batch * 8, "loss": float("nan")} for batch in (3, 6, 7)]
    first = make_recipe(tmp_path / "run", **{**settings, "training__steps": 4})
    assert run_ranks(session, 2, first, faults) == ["", ""]
    changed = make_recipe(tmp_path / "run", **{**settings, "stability__nonfinite": "roll_back"})
    ended = run_ranks(session, 2, changed, faults)
    # Batch 6 takes step 6 back to step 4; then batch 7 is the next.
    assert ended[0] == ended[1]
    assert ended[0] == (
        "step 5: loss nan, gradient norm nan. 2 steps have been skipped or rolled back before, which is all that "
        "stability.max_events allows: step 3 (skip: loss nan, gradient norm nan); "
        "step 6 (roll_back: loss nan, gradient norm nan)"
    )


@pytest.mark.parametrize(
    ("nonfinite", "expected"),
    [
        ("stop", "step 1: loss nan, gradient norm nan. Nothing was saved from here"),
        (
            "roll_back",
            "step 1 (loss nan, gradient norm nan) cannot be rolled back: there is no checkpoint",
        ),
    ],
)
def test_a_bad_step_without_a_remedy_ends_the_run(nonfinite: str, expected: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", **SAVING, stability__nonfinite=nonfinite)
    for message in run_ranks(session, 2, recipe, [{"cursor": 8, "loss": float("nan")}]):
        assert message.startswith(expected)


@SLOW
def test_the_window_survives_a_resume(tmp_path: Path) -> None:
    """A spike right after a resume is judged by the steps before it, with the same message."""
    settings = {**SAVING, "stability__spike": "skip", "stability__spike_window": 16}
    faults = [{"cursor": 7 * 8, "loss": 30.0}]
    whole = make_recipe(tmp_path / "whole", **settings)
    run_ranks(session, 2, whole, faults)
    run_ranks(session, 2, make_recipe(tmp_path / "parts", **{**settings, "training__steps": 6}), faults)
    run_ranks(session, 2, make_recipe(tmp_path / "parts", **settings), faults)
    ends = [without_timings(read_metrics(tmp_path / name)) for name in ("parts", "whole")]
    assert ends[0] == ends[1]
    assert "of the last 6 steps" in steps_of(tmp_path / "parts")[7]["skipped"]
    assert state_of(tmp_path / "parts", 8) == state_of(tmp_path / "whole", 8)


@SLOW
@pytest.mark.parametrize(
    "more",
    [
        GROWING,
        {"parallelism__pipeline_parallel_degree": 2, "training__local_batch_size": 4},
    ],
    ids=["growing", "pipeline"],
)
def test_policies_change_nothing_in_a_run_without_faults(
    more: dict[str, Any], tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """Bitwise."""
    policies = {**WATCHING, "stability__nonfinite": "roll_back", "stability__spike": "roll_back"}
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "plain", **SAVING, **more))
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "careful", **SAVING, **more, **policies))
    ends = [without_timings(read_metrics(tmp_path / name)) for name in ("plain", "careful")]
    assert ends[0] == ends[1]
    assert len(state_of(tmp_path / "careful", 8)["window"]) == (4 if more is GROWING else 8)
    assert state_of(tmp_path / "plain", 8) == {}
