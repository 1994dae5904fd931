"""Reports about going on: data, counters and moments after a resume, a start from another run, and a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import WarmRanks
from tests.reported.corpora import write_jsonl
from tests.reported.stopped import train_to
from tests.runs import make_recipe, read_metrics, run_of, train, trainer_of, without_timings
from titan_growth.liveness.exit_report import FAILED, Outcome

SAVING: dict[str, Any] = {
    "model__dim": 16,
    "model__n_layers": 2,
    "training__global_batch_size": 4,
    "checkpoint__enable": True,
    "checkpoint__interval": 100,
    "debug__log_batch_hash": True,
    "lr_scheduler__total_steps": 8,
}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return without_timings(read_metrics(folder))


def hashes_of(folder: Path) -> list[str]:
    return [line["batch_hash"] for line in read_metrics(folder) if "batch_hash" in line]


def test_olmo_584_more_steps_than_an_epoch_has(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    corpus = write_jsonl(tmp_path / "small.jsonl", [f"{number:04d} " for number in range(160)])
    settings = {**SAVING, "training__dataset_path": str(corpus), "data__validation_fraction": 0.0}
    settings |= {"training__steps": 14, "training__global_batch_size": 6}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **settings))
    whole = hashes_of(tmp_path / "whole")
    assert len(whole) == len(set(whole)) == 14
    assert read_metrics(tmp_path / "whole")[-1]["tokens"] > 2 * 160 * len("^0000 $"), "all within two epochs"
    for steps in (8, 14):  # within the second epoch
        warm_ranks(train_to, 1, 1, make_recipe(tmp_path / "parts", **settings), steps)
    assert hashes_of(tmp_path / "parts") == whole


def test_megatron_bridge_3503_data_goes_on_with_the_counters(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **SAVING, training__steps=6))
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "source", **SAVING, training__steps=3))
    source = {"checkpoint__initial_load_path": str(tmp_path / "source" / "checkpoint" / "step-3")}
    everything = {**SAVING, **source, "checkpoint__initial_load_model_only": False}
    for steps in (5, 6):  # from another folder, and then from its own
        warm_ranks(train_to, 1, 1, make_recipe(tmp_path / "run", **everything, training__steps=6), steps)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")[3:]


@pytest.mark.slow
def test_megatron_bridge_3503_data_goes_on_after_a_growth_that_changes_batch_and_length(
    tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    stage = '[{at = "3 steps", factor = 2, global_batch_size = 8, seq_len = 64}]'
    settings = {**SAVING, "training__steps": 8, "growth__stages": stage}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **settings))
    for steps in (2, 5, 8):
        warm_ranks(train_to, 1, 1, make_recipe(tmp_path / "parts", **settings), steps)
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    assert len(set(hashes_of(tmp_path / "whole"))) == 8


def _moments(rank: int, recipe: Any) -> tuple[float, float]:
    """(largest first moment, largest step counter) of a run that is about to take its next step."""
    with trainer_of(recipe, 1) as trainer:
        if trainer.state.growth_is_due():
            assert trainer.grow()
        state = list(trainer.runtime.optimizer.named_state())
    largest = {
        wanted: max(tensor.abs().max().item() for _, key, tensor in state if key == wanted)
        for wanted in ("exp_avg", "step")
    }
    return largest["exp_avg"], largest["step"]


def test_levanter_726_moments_are_reset_when_asked(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "source", **SAVING, training__steps=2))
    source = {**SAVING, "checkpoint__initial_load_path": str(tmp_path / "source" / "checkpoint" / "step-2")}
    for model_only, moments in ((True, False), (False, True)):
        recipe = make_recipe(tmp_path / f"{model_only}", **source, checkpoint__initial_load_model_only=model_only)
        ((largest, steps),) = warm_ranks(_moments, 1, recipe)
        assert (largest > 0, steps) == (moments, 2.0 * moments)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["reset", "copy"])
def test_levanter_726_moments_at_a_growth_after_one_step(policy: str, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    small = {**SAVING, "training__steps": 1, "model__n_layers": 1}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "source", **small))
    source = {
        "checkpoint__initial_load_path": str(tmp_path / "source" / "checkpoint" / "step-1"),
        "checkpoint__initial_load_model_only": False,
    }
    growth = {"growth__stages": f'[{{at = "1 steps", factor = 2, optimizer_state = "{policy}"}}]'}
    ((largest, steps),) = warm_ranks(_moments, 1, make_recipe(tmp_path / "run", **{**SAVING, **source, **growth}))
    assert (largest > 0, steps) == ((False, 0.0) if policy == "reset" else (True, 1.0))


def _outcome(rank: int, recipe: Any) -> Outcome:
    run = run_of(recipe, 1)
    run.session.stop.name = "SIGTERM"
    return run.session.run(run.start)


def test_megatron_bridge_5068_a_signal_without_checkpoints_is_not_swallowed(
    tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    recipe = make_recipe(tmp_path / "run", **{**SAVING, "checkpoint__enable": False}, training__steps=100)
    (outcome,) = warm_ranks(_outcome, 1, recipe)
    assert outcome.status == FAILED
    assert outcome.message == "stopped at step 1 without saving: checkpoint.enable is false"
