"""Checkpoints of torchtitan 0.2.2 start a run, and ours use its names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, train, trainer_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.tools.findings import Findings

SAVING = {"checkpoint__enable": True, "checkpoint__interval": 2, "training__steps": 2}


def _torchtitan_checkpoint(_rank: int, folder: str, weights: dict[str, torch.Tensor]) -> None:
    """torchtitan's layout: weights at the top level, flattened optimizer state with a byte entry for every
    hyper-parameter, schedulers, the loader's state pickled by rank, counters."""
    state: dict[str, Any] = dict(weights)
    for name, weight in weights.items():
        state[f"optimizer.state.{name}.exp_avg"] = torch.zeros_like(weight)
        state[f"optimizer.state.{name}.exp_avg_sq"] = torch.zeros_like(weight)
        state[f"optimizer.state.{name}.step"] = torch.tensor(3.0)
        for key, value in {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}.items():
            state[f"optimizer.param_groups.{name}.{key}"] = value
    state["lr_scheduler.last_epoch"] = 3
    state["dataloader.dp_rank_0"] = pickle.dumps({"sample_idx": 5})
    state["dataloader.world_size"] = 1
    state["train_state.step"] = torch.tensor(3)
    state["train_state.ntokens_seen"] = torch.tensor(768)
    dcp.save(state, checkpoint_id=folder)


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    recipe = make_recipe(tmp_path / "sizes")
    config = model_config_of(recipe.model, Findings())
    assert config is not None
    generator = torch.Generator().manual_seed(3)
    model = family_module("llama3").Decoder(config, 32)
    return {name: torch.randn(weight.shape, generator=generator) * 0.02 for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(
    ("num_ranks", "mesh"),
    [
        pytest.param(1, {}, id="1 rank"),
        pytest.param(2, {"parallelism__tensor_parallel_degree": 2}, id="tp2"),
        pytest.param(
            4,
            {"parallelism__pipeline_parallel_degree": 2, "parallelism__tensor_parallel_degree": 2},
            id="pp2 x tp2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_torchtitans_weights_start_a_run(
    num_ranks: int, mesh: dict[str, int], weights: dict[str, torch.Tensor], tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """The first loss is that of its weights, on one rank and on a different mesh."""
    source = tmp_path / "torchtitan" / "step-3"
    warm_ranks(_torchtitan_checkpoint, 1, str(source), weights)
    recipe = make_recipe(tmp_path / "run", **SAVING, **mesh, checkpoint__initial_load_path=str(source))
    warm_ranks(train, num_ranks, num_ranks, recipe)
    first = read_metrics(tmp_path / "run")[0]
    assert first["step"] == 1
    one = make_recipe(tmp_path / "one", **SAVING, checkpoint__initial_load_path=str(source))
    warm_ranks(train, 1, 1, one)
    assert first["loss"] == pytest.approx(read_metrics(tmp_path / "one")[0]["loss"], rel=1e-5)
    scratch = make_recipe(tmp_path / "scratch", training__steps=2)
    warm_ranks(train, 1, 1, scratch)
    assert first["loss"] != pytest.approx(read_metrics(tmp_path / "scratch")[0]["loss"], rel=1e-3)


def test_our_checkpoint_has_torchtitans_names(
    weights: dict[str, torch.Tensor], tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """Every tensor that torchtitan would look for, from two pipeline ranks."""
    recipe = make_recipe(tmp_path / "run", **SAVING, parallelism__pipeline_parallel_degree=2)
    warm_ranks(train, 2, 2, recipe)
    metadata = dcp.FileSystemReader(tmp_path / "run" / "checkpoint" / "step-2").read_metadata()
    for name, weight in weights.items():
        assert metadata.state_dict_metadata[name].size == weight.shape
        for key in ("exp_avg", "exp_avg_sq"):
            assert metadata.state_dict_metadata[f"optimizer.state.{name}.{key}"].size == weight.shape
        assert f"optimizer.state.{name}.step" in metadata.state_dict_metadata


def _tied_copies(rank: int, num_ranks: int, recipe: Recipe) -> list[torch.Tensor]:
    with trainer_of(recipe, num_ranks) as trainer:
        tensors = [part.state_dict() for part in trainer.runtime.engine.model.parts]
    return [state[name] for state in tensors for name in ("tok_embeddings.weight", "output.weight") if name in state]


@pytest.mark.parametrize(("num_ranks", "mesh"), [(1, {}), (2, {"parallelism__pipeline_parallel_degree": 2})])
def test_a_tied_model_takes_the_embedding_of_one_that_was_not_tied(
    num_ranks: int, mesh: dict[str, int], weights: dict[str, torch.Tensor], tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """Head and embedding are one parameter, so both must start from one tensor, on every mesh."""
    source = tmp_path / "torchtitan" / "step-3"
    warm_ranks(_torchtitan_checkpoint, 1, str(source), weights)
    recipe = make_recipe(
        tmp_path / "run",
        **SAVING,
        **mesh,
        model__tie_word_embeddings=True,
        checkpoint__initial_load_path=str(source),
    )
    copies = [copy for found in warm_ranks(_tied_copies, num_ranks, num_ranks, recipe) for copy in found]
    assert len(copies) == 2
    for copy in copies:
        assert torch.equal(copy, weights["tok_embeddings.weight"])
