"""LiGO: gradients equal autograd's, learning lowers the loss, and every mesh learns the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.func import functional_call

from tests.distributed.meshes import Case, mesh
from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, relative_difference, train, trainer_of, without_timings
from tests.unit.growth.test_function import CONFIGS, logits_of, model_of, state_of
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.ligo import LearnedGrowth
from titan_growth.growth.operators.base import GrowthMap, operators
from titan_growth.models.registry import family_module

WIDER = {"dim": 72, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 100}


def learned_growth(folder: Path, case: str, **settings: Any) -> tuple[torch.nn.Module, torch.nn.Module, LearnedGrowth]:
    family, config = CONFIGS[case]
    stage = PlannedGrowth.model_validate({"at": "1 step", "operator": "learn", **settings})
    growth = operators()["learn"].grow(config, stage)
    assert isinstance(growth, GrowthMap), growth
    small, large = model_of(family, config, seed=3), model_of(family, growth.after)
    dcp.save(state_of(small), checkpoint_id=folder, no_dist=True)
    roles = family_module(family).ROLES
    device = torch.device("cpu")
    parameters = dict(large.named_parameters())
    learned = LearnedGrowth(folder, growth, parameters, roles=roles, seed=5, device=device)
    return small, large, learned


def _gradients(rank: int, folder: Path, case: str, settings: dict[str, Any]) -> None:
    _, large, learned = learned_growth(folder, case, **settings)
    for tensor in learned.maps:  # away from the identity, where many gradients vanish
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    learned.write()
    tokens = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(2))
    large(tokens, None, tokens).sum().backward()
    found = learned.gradients()

    leaves = [tensor.clone().requires_grad_() for tensor in learned.maps]
    widths = dict(zip(sorted(learned.widths), leaves, strict=False))
    depths = dict(zip(sorted(learned.depths), leaves[len(widths) :], strict=True))
    learned.widths, learned.depths = widths, depths
    made = {shard.name: learned._made(shard) for shard in learned.shards}
    for copy, name in learned.growth_map.after.tied.items():
        made[copy] = made[name]
    functional_call(large, made, (tokens, None, tokens)).sum().backward()
    for gradient, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        difference = (gradient - leaf.grad).norm() / leaf.grad.norm()
        assert difference < 1e-5, f"off by {difference:.1e}"


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("settings", [{"factor": 2}, WIDER, {**WIDER, "n_layers": 5}])
def test_gradients_are_autograds(case: str, settings: dict[str, Any], tmp_path: Path, warm_ranks: WarmRanks) -> None:
    warm_ranks(_gradients, 1, tmp_path, case, settings)


def _start(rank: int, folder: Path) -> None:
    small, large, learned = learned_growth(folder, "llama3", factor=2)
    learned.write()
    for name, parameter in large.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("layers") else None
        source = name if layer is None else name.replace(f"layers.{layer}.", f"layers.{layer % 3}.")
        assert torch.equal(parameter, small.get_parameter(source)), name
    assert logits_of(large).isfinite().all()


def test_over_depth_it_starts_as_a_stack(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    warm_ranks(_start, 1, tmp_path)


def recipe_of(folder: Path, case: Case, **more: Any) -> Any:
    """A run that learns its growth from 2 layers of width 16 after step 4."""
    stage = {"at": "4 steps", "operator": "learn", "n_layers": 4, "dim": 32, "n_heads": 4, "n_kv_heads": 2}
    return make_recipe(
        folder,
        **case.layout,
        **{f"growth__stages__0__{key}": value for key, value in stage.items()},
        growth__stages__0__hidden_dim=64,
        growth__stages__0__options='{steps = 12, lr = 0.02}',
        model__head_dim=8,
        model__hidden_dim=64,
        **{f"growth__base__{key}": value for key, value in
           {"n_layers": 2, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 40}.items()},
        checkpoint__enable=True,
        checkpoint__interval=100,
        training__steps=7,
        **more,
    )  # fmt: skip


def grown(folder: Path, case: Case, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(metrics, event) of such a run."""
    recipe = recipe_of(folder, case, **more)
    run_ranks(train, case.num_ranks, case.num_ranks, recipe, timeout_seconds=200)
    lineage = json.loads((folder / "checkpoint" / "step-7" / "lineage.json").read_text())
    (event,) = lineage["events"]
    return [line for line in read_metrics(folder) if "loss" in line], event


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The run on one rank."""
    return grown(tmp_path_factory.mktemp("learned") / "alone", mesh())


def test_it_learns_and_every_mesh_learns_the_same(
    alone: tuple[list[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    expected, event = alone
    assert event["learning"]["steps"] == 12
    assert event["learning"]["last_loss"] < event["learning"]["first_loss"] - 0.1, "learning did not lower the loss"
    tokens = [line["tokens"] for line in expected]
    assert tokens[4] - tokens[3] == 13 * 256, "the batches of the learning phase are counted, and not seen again"
    for name, case in {"pp x fsdp": mesh(pp=2, shard=2)}.items():
        found, other = grown(tmp_path / name, case)
        assert other["learning"]["last_loss"] == pytest.approx(event["learning"]["last_loss"], rel=1e-4)
        for line, reference in zip(found, expected, strict=True):
            assert relative_difference(line, reference, "loss") < 1e-4


def stopped_while_learning(rank: int, num_ranks: int, recipe: Any) -> None:
    """A run asked to stop at the fourth batch of its learning phase."""
    with trainer_of(recipe, num_ranks) as trainer:
        agree, calls = trainer.agree, [0]

        def agree_or_stop(runtime: Any, batch: Any) -> Any:
            calls[0] += 1
            if calls[0] == 8:
                trainer.stop.name = "SIGTERM"
            return agree(runtime, batch)

        trainer.agree = agree_or_stop
        assert not trainer.fit()
        assert calls[0] == 8, "it has learned on"
        assert (trainer.progress.step, len(trainer.lineage.events)) == (4, 0)
        assert trainer.checkpointer.saver.last_saved is not None
        assert trainer.checkpointer.saver.last_saved.step == 4


def test_a_stop_while_it_learns_ends_the_run_and_loses_nothing_but_the_learning(
    alone: tuple[list[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    run_ranks(stopped_while_learning, 1, 1, recipe_of(tmp_path, mesh()), timeout_seconds=200)
    found, _ = grown(tmp_path, mesh())
    assert without_timings(found) == without_timings(alone[0])


@pytest.mark.slow
def test_a_tied_head_over_pipeline_parts(tmp_path: Path) -> None:
    settings = {"model__name": "qwen3", "model__tie_word_embeddings": True}
    expected, _ = grown(tmp_path / "alone", mesh(), **settings)
    found, _ = grown(tmp_path / "3D", mesh(pp=2, shard=2), **settings)
    for line, reference in zip(found, expected, strict=True):
        assert relative_difference(line, reference, "loss") < 1e-4


def test_it_learns_the_same_beside_qk_clip_and_the_sdc_check(
    alone: tuple[list[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    """Both are for steps of the run. With a threshold out of reach, what is learned is the same, bit for bit."""
    event = grown(tmp_path / "run", mesh(), optimizer__qk_clip=1e6, debug__sdc_check_interval=1)[1]
    assert event["learning"] == alone[1]["learning"]
    assert event["loss_after"] == alone[1]["loss_after"]
