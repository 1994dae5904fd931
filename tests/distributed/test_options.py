"""Every option does what its help text says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli

from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, train, without_timings
from titan_growth.checkpoint.folder import open_step
from titan_growth.checkpoint.reader import SafeReader

SAVING = {"checkpoint__enable": True, "checkpoint__interval": 2, "lr_scheduler__decay_ratio": 0.0}


def folders(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoint").iterdir() if path.is_dir()}


def test_loader_workers_change_nothing(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Two worker processes give the lines of a run without them."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "plain"))
    options = {"training__dataloader__num_workers": 2, "training__dataloader__prefetch_factor": 3}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "workers", **options))
    assert without_timings(read_metrics(tmp_path / "workers")) == without_timings(read_metrics(tmp_path / "plain"))


def test_first_step_checkpoint_and_retention(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """A checkpoint after step 1, every second step and the last; two are kept."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "all", **SAVING, checkpoint__enable_first_step_checkpoint=True))
    assert folders(tmp_path / "all") == {"step-1", "step-2", "step-4", "step-6"}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "two", **SAVING, checkpoint__keep_latest_k=2))
    assert folders(tmp_path / "two") == {"step-4", "step-6"}


def test_load_step_goes_back_and_keeps_what_came_after(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Again from step 2: the same lines, and later checkpoints are set aside."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **SAVING))
    lines = without_timings(read_metrics(tmp_path / "run"))
    run_ranks(train, 1, 1, make_recipe(tmp_path / "run", **SAVING, training__steps=5, checkpoint__load_step=2))
    assert without_timings(read_metrics(tmp_path / "run")) == lines[:5]
    assert folders(tmp_path / "run") == {"step-2", "step-4", "step-5", "superseded-4", "superseded-6"}


def test_initial_load_of_weights_and_of_everything(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Weights only: step 1 has the source's loss. Everything: the run continues where the source stopped."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **SAVING, training__steps=8))
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "source", **SAVING, training__steps=4))
    source = str(tmp_path / "source" / "checkpoint" / "step-4")
    settings = {**SAVING, "checkpoint__initial_load_path": source, "training__steps": 8}
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "weights", **settings))
    run_ranks(train, 1, 1, make_recipe(tmp_path / "all", **settings, checkpoint__initial_load_model_only=False))
    whole = without_timings(read_metrics(tmp_path / "whole"))
    weights = read_metrics(tmp_path / "weights")
    assert [line["step"] for line in weights] == list(range(1, 9))
    assert weights[0]["loss"] < whole[0]["loss"] - 0.5, "it does not start from trained weights"
    assert without_timings(read_metrics(tmp_path / "all")) == whole[4:]


def test_a_last_checkpoint_of_weights_only(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """It holds no moments, records that, and can start another run."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **SAVING, checkpoint__last_save_model_only=True))
    last = open_step(tmp_path / "run" / "checkpoint" / "step-6")
    assert last is not None
    assert last.manifest.model_only
    assert not [name for name in SafeReader(last.path).tensor_entries() if name.startswith(("optimizer.", "rng."))]
    assert [n for n in SafeReader(last.path.with_name("step-4")).tensor_entries() if n.startswith("optimizer.")]
    settings = {**SAVING, "checkpoint__initial_load_path": str(last.path), "training__steps": 2}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "next", **settings))
    assert read_metrics(tmp_path / "next")[0]["loss"] < read_metrics(tmp_path / "run")[0]["loss"] - 0.5


def test_load_only_never_saves(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """It resumes, and leaves the folder unchanged."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **SAVING, training__steps=4))
    run_ranks(train, 1, 1, make_recipe(tmp_path / "run", **SAVING, training__steps=6, checkpoint__load_only=True))
    assert folders(tmp_path / "run") == {"step-2", "step-4"}
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_on_every_rank_and_profiler_traces(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """One event folder per rank, and one trace per rank that is valid JSON."""
    options = {
        "metrics__enable_tensorboard": True,
        "metrics__save_for_all_ranks": True,
        "profiling__enable_profiling": True,
        "profiling__profile_freq": 3,
        "profiling__profiler_warmup": 1,
    }
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "run", **options))
    for rank in (0, 1):
        assert list((tmp_path / "run" / "tb" / f"rank_{rank}").glob("events.*"))
        trace = tmp_path / "run" / "profile_traces" / "iteration_3" / f"rank{rank}_trace.json"
        assert json.loads(trace.read_text())["traceEvents"]


def test_a_checkpoint_carries_the_effective_recipe(tmp_path: Path) -> None:
    """With what the run decided: the drawn seed and the derived batch size."""
    recipe = make_recipe(tmp_path / "run", **SAVING, training__global_batch_size=-1)
    unseeded = recipe.model_copy(update={"debug": recipe.debug.model_copy(update={"seed": None})})
    run_ranks(train, 2, 2, unseeded)
    table = tomli.loads((tmp_path / "run" / "checkpoint" / "step-6" / "recipe.toml").read_text())
    assert table["training"]["global_batch_size"] == 4, "2 sequences on each of 2 ranks"
    assert isinstance(table["debug"]["seed"], int)
    # Another number of ranks keeps both.
    longer = unseeded.model_copy(update={"training": recipe.training.model_copy(update={"steps": 8})})
    run_ranks(train, 1, 1, longer)
    later = tomli.loads((tmp_path / "run" / "checkpoint" / "step-8" / "recipe.toml").read_text())
    assert later["training"]["global_batch_size"] == 4
    assert later["debug"]["seed"] == table["debug"]["seed"]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("AdamW", "for-loop"),
        ("Adam", "fused"),
        pytest.param("AdamW", "foreach", marks=pytest.mark.slow),
        pytest.param("Adam", "for-loop", marks=pytest.mark.slow),
        pytest.param("Adam", "foreach", marks=pytest.mark.slow),
        pytest.param("AdamW", "fused", marks=pytest.mark.slow),
    ],
)
def test_optimizers_learn_sharded(name: str, implementation: str, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """All six combinations, on two ranks."""
    options = {"optimizer__name": name, "optimizer__implementation": implementation, "training__steps": 8}
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "run", **options))
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3


def test_bfloat16_parameters(tmp_path: Path) -> None:
    """training.dtype = bfloat16 keeps weights and moments in it."""
    run_ranks(
        train,
        2,
        2,
        make_recipe(tmp_path / "run", **SAVING, training__dtype="bfloat16", training__mixed_precision_param="bfloat16"),
    )
    entries = SafeReader(tmp_path / "run" / "checkpoint" / "step-6").tensor_entries()
    kinds = {name: str(entry.properties.dtype) for name, entry in entries.items()}
    assert kinds["layers.0.feed_forward.w1.weight"] == "torch.bfloat16"
    assert kinds["optimizer.state.layers.0.feed_forward.w1.weight.exp_avg"] == "torch.bfloat16"
