"""Reports about checkpoints: what is in one, when it counts, and what is removed for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, save_tensors, train, trainer_of, without_timings
from titan_growth.checkpoint import saving
from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.loading import load
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.search import find_checkpoint
from titan_growth.checkpoint.steps import committed_steps, step_path
from titan_growth.config.schema.recipe import CheckpointConfig, OptimizerConfig
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.state import optimizer_tensors

SAVING: dict[str, Any] = {
    "model__dim": 16,
    "model__n_layers": 2,
    "training__global_batch_size": 4,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "lr_scheduler__decay_ratio": 0.0,
}


def manager(folder: Path, **section: Any) -> CheckpointManager:
    return CheckpointManager(CheckpointConfig(enable=True, **section), folder)


def saved(folder: Path, step: int, tensors: dict[str, Tensor], **section: Any) -> StepFolder:
    checkpoints = manager(folder, **section)
    save_tensors(checkpoints, step, tensors, model_only=False)
    checkpoints.saver.close()
    assert checkpoints.saver.last_saved is not None
    return checkpoints.saver.last_saved


# ---- what is in a checkpoint -----------------------------------------------------------------------------------------


def optimizer_of(seed: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("used", "unused")})
    return model, Optimizer([model], OptimizerConfig(), max_norm=1.0)


def _never_a_gradient(rank: int, folder: Path) -> dict[str, float]:
    model, optimizer = optimizer_of(0)
    model["used"].weight.grad = torch.ones(4, 4)
    optimizer.clip()
    optimizer.step(1e-2)
    step = saved(folder, 1, optimizer_tensors(optimizer))
    _, resumed = optimizer_of(1)
    load(SafeReader(step.path), optimizer_tensors(resumed))
    return {name: state.item() for name, key, state in resumed.named_state() if key == "step"}


def test_prime_rl_3399_a_parameter_that_never_had_a_gradient(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    assert warm_ranks(_never_a_gradient, 1, tmp_path) == [{"used.weight": 1.0, "unused.weight": 0.0}]


def _frozen_since(rank: int, folder: Path) -> bool:
    model, optimizer = optimizer_of(0)
    for parameter in model.parameters():
        parameter.grad = torch.ones(4, 4)
    optimizer.step(1e-2)
    model["unused"].weight.requires_grad_(False)
    step = saved(folder, 1, optimizer_tensors(optimizer))
    model, resumed = optimizer_of(1)
    model["unused"].weight.requires_grad_(False)
    load(SafeReader(step.path), optimizer_tensors(resumed))
    stored = {(name, key): state for name, key, state in optimizer.named_state()}
    assert stored["unused.weight", "exp_avg"].any()
    return all(torch.equal(state, stored[name, key]) for name, key, state in resumed.named_state())


def test_pytorch_192202_moments_of_a_parameter_that_was_frozen_later(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    assert warm_ranks(_frozen_since, 1, tmp_path) == [True]


def _views(rank: int, folder: Path) -> int:
    whole = torch.arange(1_000_000, dtype=torch.float32).reshape(1000, 1000)
    views = {"rows": whole[10:20], "columns": whole[:, :3], "one": whole[0, :1]}
    step = saved(folder, 1, views)
    found = {name: torch.zeros(view.shape) for name, view in views.items()}
    load(SafeReader(step.path), found)
    assert all(torch.equal(found[name], views[name]) for name in views)
    return sum(file.stat().st_size for file in step.path.glob("*.distcp"))


def test_pytorch_1995_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    (num_bytes,) = warm_ranks(_views, 1, tmp_path)
    values = 4 * (10 * 1000 + 3 * 1000 + 1)
    assert values < num_bytes < values + 10_000


def _random_states(rank: int, num_ranks: int, recipe: Any) -> tuple[list[float], list[float]]:
    with trainer_of(recipe, num_ranks) as trainer:
        at_the_start = torch.rand(3).tolist()
        assert trainer.fit()
        torch.rand(rank + 1)
        trainer.save(growing=False)
        trainer.checkpointer.saver.wait()
        return at_the_start, torch.rand(3).tolist()


def test_megatron_6858_each_rank_gets_its_own_random_state_back(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    ends = warm_ranks(_random_states, 2, 2, make_recipe(tmp_path / "run", **SAVING, training__steps=2))
    starts = warm_ranks(_random_states, 2, 2, make_recipe(tmp_path / "run", **SAVING, training__steps=3))
    assert [start for start, _ in starts] == [end for _, end in ends]
    assert ends[0][1] != ends[1][1]


def test_automodel_2571_a_tied_head_after_a_resume(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    tied = {**SAVING, "model__tie_word_embeddings": True}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "whole", **tied, training__steps=4))
    for steps in (2, 4):
        warm_ranks(train, 1, 1, make_recipe(tmp_path / "parts", **tied, training__steps=steps))
    whole, parts = (without_timings(read_metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert parts == whole


# ---- when it counts, and what is removed -----------------------------------------------------------------------------


def _killed_in_a_background_save(rank: int, num_ranks: int, recipe: Any) -> None:
    commit = saving.write_manifest

    def die(path: Path, *args: Any) -> None:
        if path.name == "step-4":
            os._exit(0)
        commit(path, *args)

    saving.write_manifest = die
    train(rank, num_ranks, recipe)


def test_kempnerforge_102_a_save_that_dies_costs_no_older_checkpoint(tmp_path: Path) -> None:
    settings = {**SAVING, "checkpoint__interval": 1, "checkpoint__async_mode": "async", "checkpoint__keep_latest_k": 2}
    recipe = make_recipe(tmp_path / "run", **settings)
    with pytest.raises(AssertionError, match="rank 0 ended with 0"):
        run_ranks(_killed_in_a_background_save, 1, 1, recipe)
    root = tmp_path / "run" / "checkpoint"
    assert (root / "step-4" / ".metadata").exists(), "it died too early"
    assert [folder.step for folder in committed_steps(root).usable] == [3, 2]
    found = find_checkpoint(recipe.checkpoint, root).checkpoint
    assert found is not None
    assert found.step == 3


def _crashed(rank: int, folder: Path) -> tuple[int | None, list[str]]:
    saved(folder, 4, {"w": torch.ones(2)})
    dead = saved(folder, 9, {"w": torch.zeros(2)}).path
    (dead / "manifest.json").unlink()
    checkpoints = manager(folder)
    checkpoints.ledger.strike([9])
    step_path(checkpoints.root, 12).mkdir()
    found = find_checkpoint(checkpoints.section, checkpoints.root)
    return found.checkpoint.step if found.checkpoint else None, found.notes


def test_torchtitan_4191_a_save_that_crashed_is_not_the_newest(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    ((step, notes),) = warm_ranks(_crashed, 1, tmp_path)
    assert step == 4
    assert len(notes) == 2, "the remains are spoken of"
    assert "step-12" in notes[0]
    assert "step-9" in notes[1]


def _abandoned(rank: int, folder: Path) -> list[int]:
    kept = {"keep_latest_k": 2}
    for step in (2, 4):
        saved(folder, step, {"w": torch.ones(2)}, **kept)
    for step in (5, 7):
        step_path(manager(folder).root, step).mkdir()
    (manager(folder).root / "step-of-mine").mkdir()
    saved(folder, 8, {"w": torch.ones(2)}, **kept)
    root = manager(folder).root
    assert (root / "step-of-mine").is_dir()
    assert not (root / "step-5").exists()
    return [found.step for found in committed_steps(root).usable]


def test_torchtitan_4197_abandoned_folders_do_not_count_as_kept(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    assert warm_ranks(_abandoned, 1, tmp_path) == [[8, 4]]
