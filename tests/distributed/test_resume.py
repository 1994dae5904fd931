"""A run interrupted anywhere and restarted leaves the metrics of an unbroken one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, train, without_timings
from titan_growth.checkpoint.folder import open_step
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.loader import to_toml

GROWING: dict[str, Any] = {
    "training__steps": 8,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "validation__enable": True,
    "validation__freq": 3,
    "validation__local_batch_size": 4,
    "debug__log_batch_hash": True,
    "growth__stages": '[{at = "4 steps", operator = "stack", factor = 2}]',
}


def crash_after(rank: int, num_ranks: int, recipe: Any, step: int, where: str) -> None:
    """Trains, and dies silently at a point of a step, like under `kill -9`."""
    from titan_growth.checkpoint import saving
    from titan_growth.run.runtime import PhaseRuntime
    from titan_growth.trainer import Trainer

    def die(*_: Any, **__: Any) -> None:
        os._exit(0)

    def at(kind: type, name: str, condition: Any, before: bool) -> None:
        original = getattr(kind, name)

        def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
            if before and condition(self):
                die()
            result = original(self, *args, **kwargs)
            if not before and condition(self):
                die()
            return result

        setattr(kind, name, patched)

    if where == "after the step":
        at(Trainer, "record", lambda trainer: trainer.progress.step == step, before=False)
    elif where == "before the commit":
        saving.write_manifest = die  # only rank 0 commits; the others wait for it in a collective and must die too
        if rank:
            at(Trainer, "save", lambda trainer: trainer.progress.step == step, before=True)
    elif where == "while growing":
        at(PhaseRuntime, "held_out_loss", lambda runtime: runtime.phase.growth_map is not None, before=True)
    elif where == "before growing":
        at(Trainer, "grow", lambda trainer: trainer.progress.step == step, before=True)
    elif where == "after growing":
        at(Trainer, "grow", lambda trainer: trainer.progress.step == step, before=False)
    train(rank, num_ranks, recipe)


ALL_CRASHES = [
    (1, "after the step"),  # before any checkpoint
    (2, "before the commit"),  # a save that never became a checkpoint
    (3, "after the step"),
    (4, "before growing"),
    (4, "while growing"),
    (4, "after growing"),
    (5, "after the step"),  # the first step of the grown model
    (7, "after the step"),  # after the grown model's first checkpoint
]
SOME_CRASHES = [(2, "before the commit"), (4, "while growing"), (7, "after the step")]
"""Of the default suite: one in a save, one in a growth, one in a step of the grown model."""


@pytest.mark.parametrize(
    ("num_ranks", "precision", "crashes"),
    [
        (2, "float32", SOME_CRASHES),
        *(
            pytest.param(num_ranks, precision, ALL_CRASHES, marks=pytest.mark.slow)
            for num_ranks in (1, 2)
            for precision in ("float32", "bfloat16")
        ),
    ],
)
def test_an_interrupted_run_is_bitwise_an_unbroken_one(
    num_ranks: int, precision: str, crashes: list[tuple[int, str]], tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """Killed at several points in turn, in the same folder."""
    settings = {**GROWING, "training__mixed_precision_param": precision}
    warm_ranks(train, num_ranks, num_ranks, make_recipe(tmp_path / "whole", **settings))
    expected = without_timings(read_metrics(tmp_path / "whole"))
    broken = make_recipe(tmp_path / "broken", **settings)
    for step, where in crashes:
        with pytest.raises((AssertionError, FileNotFoundError)):
            run_ranks(crash_after, num_ranks, num_ranks, broken, step, where)
    run_ranks(train, num_ranks, num_ranks, broken)
    assert without_timings(read_metrics(tmp_path / "broken")) == expected
    kinds = [
        ("growth" if "event" in line else "validation" if "validation_loss" in line else "step") for line in expected
    ]
    assert kinds.count("growth") == 1
    assert kinds.index("growth") == 6, "steps 1-4, validations at 3 and 4, then the growth"


@pytest.mark.slow  # test_elastic.py and test_growth_across_meshes.py have one change of ranks each
def test_resume_on_another_number_of_ranks_sees_the_same_batches(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """4 ranks past the growth, then 2, then 1: the global batches' hashes are those of an unbroken run."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **GROWING))
    for num_ranks, steps in ((4, 5), (2, 6), (1, 8)):
        settings = {**GROWING, "training__steps": steps}
        warm_ranks(train, num_ranks, num_ranks, make_recipe(tmp_path / "moved", **settings))
    expected = [line["batch_hash"] for line in read_metrics(tmp_path / "whole") if "batch_hash" in line]
    found = [line["batch_hash"] for line in read_metrics(tmp_path / "moved") if "batch_hash" in line]
    assert len(set(expected)) == 8
    assert found == expected


def test_a_longer_run_goes_on_from_the_last_checkpoint(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Raising training.steps on a finished run continues it; a constant learning rate makes the two comparable."""
    settings = {"checkpoint__enable": True, "lr_scheduler__decay_ratio": 0.0, "checkpoint__interval": 100}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", training__steps=6, **settings))
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "parts", training__steps=3, **settings))
    run_ranks(train, 1, 1, make_recipe(tmp_path / "parts", training__steps=6, **settings))
    assert without_timings(read_metrics(tmp_path / "parts")) == without_timings(read_metrics(tmp_path / "whole"))


def test_a_changed_learning_rate_takes_effect(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Hyper-parameters come from the recipe, never from the checkpoint."""
    settings = {"checkpoint__enable": True, "lr_scheduler__warmup_steps": 0, "lr_scheduler__decay_ratio": 0.0}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", training__steps=3, **settings))
    run_ranks(train, 1, 1, make_recipe(tmp_path / "run", training__steps=6, optimizer__lr=1e-9, **settings))
    lines = read_metrics(tmp_path / "run")
    assert [line["lr"] for line in lines] == [1e-2] * 3 + [1e-9] * 3


def test_a_checkpoint_is_a_standard_dcp_folder_with_torchtitans_names(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Weights at the top level, moments under optimizer.state, and no byte entries."""
    recipe = make_recipe(tmp_path / "run", training__steps=2, checkpoint__enable=True)
    warm_ranks(train, 2, 2, recipe)
    folder = open_step(tmp_path / "run" / "checkpoint" / "step-2")
    assert folder is not None
    names = set(SafeReader(folder.path).tensor_entries())
    assert "layers.3.attention.wq.weight" in names
    assert "optimizer.state.tok_embeddings.weight.exp_avg_sq" in names
    assert "rng.rank_1.cpu" in names
    assert len(names) == (4 * 9 + 3) * 4 + 2, "a weight, two moments and a step counter each, and two random states"


def test_checkpoints_in_another_folder_are_not_ignored(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """A changed `checkpoint.folder` would silently start the run from scratch."""
    from titan_growth.run.start import Site, resolve
    from titan_growth.tools.errors import ConfigError
    from titan_growth.tools.run_folder import RunFolder

    recipe = make_recipe(tmp_path / "run", training__steps=2, checkpoint__enable=True)
    warm_ranks(train, 1, 1, recipe)
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(recipe))
    moved = make_recipe(tmp_path / "run", training__steps=2, checkpoint__enable=True, checkpoint__folder="other")
    with pytest.raises(
        ConfigError, match=r"^checkpoint\.folder: there is no checkpoint in \S+/other, but .* step-2\. "
    ):
        resolve(moved, Site(RunFolder(tmp_path / "run"), 2, "cpu"))
