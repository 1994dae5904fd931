"""Growth in the middle of a run: every tensor equals its source, on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, train, trainer_of
from titan_growth.growth.rules import Rule, Rules
from titan_growth.models.roles import layer_of, with_layer

STAGE = '{{at = "3 steps", operator = "stack", factor = 4, optimizer_state = "{moments}", lr_policy = "{lr}"}}'


def growing(moments: str = "reset", lr: str = "restart", **more: Any) -> dict[str, Any]:
    """3 layers grown to 12 after step 3."""
    return {
        "model__n_layers": 12,
        "training__steps": 6,
        "checkpoint__enable": True,
        "checkpoint__interval": 100,
        "growth__stages": f"[{STAGE.format(moments=moments, lr=lr)}]",
        **more,
    }


def stored(path: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step folder, read with PyTorch's own converter."""
    target = tmp_path / f"{path.parent.parent.name}-{path.name}.pt"
    dcp_to_torch_save(path, target)
    return torch.load(target, weights_only=True)


def just_grown(rank: int, num_ranks: int, recipe: Any) -> dict[str, torch.Tensor]:
    """Trains up to the growth, grows, and returns this rank's full tensors."""
    with trainer_of(recipe, num_ranks) as trainer:
        original = trainer.grow
        found: dict[str, torch.Tensor] = {}

        def grow_and_look() -> bool:
            assert original()
            for name, tensor in trainer.runtime.tensors(optimizer=True).items():
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                found[name] = full.clone()
            return True

        trainer.grow = grow_and_look
        trainer.fit()
        return found


@pytest.mark.parametrize("num_ranks", [1, *(pytest.param(many, marks=pytest.mark.slow) for many in (2, 4))])
@pytest.mark.parametrize("moments", [pytest.param("reset", marks=pytest.mark.slow), "copy"])
def test_every_layer_is_bitwise_its_source(num_ranks: int, moments: str, tmp_path: Path) -> None:
    """12 layers from 3; the moments too with `copy`, zero with `reset`."""
    recipe = make_recipe(tmp_path / "run", **growing(moments=moments))
    (grown, *_) = run_ranks(just_grown, num_ranks, num_ranks, recipe)
    source = stored(tmp_path / "run" / "checkpoint" / "step-3", tmp_path)
    layers = {layer_of(name) for name in grown}
    assert layers == {None, *range(12)}
    for name, tensor in grown.items():
        layer = layer_of(name)
        origin = source[name if layer is None else with_layer(name, layer % 3)]
        if name.startswith("optimizer.") and moments == "reset":
            assert not tensor.any(), f"{name} was not reset"
        else:
            assert torch.equal(tensor, origin), f"{name} is not its source"
    assert source["optimizer.state.layers.2.attention.wo.weight.exp_avg"].any(), "the source has no moments to copy"


def test_growth_is_reported_and_the_run_goes_on(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """The growth line, each step's depth, and FLOPs counted at the current depth."""
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "run", **growing(), validation__enable=True, validation__freq=100))
    lines = read_metrics(tmp_path / "run")
    (growth,) = [line for line in lines if "event" in line]
    assert (growth["event"], growth["step"], growth["from_layers"], growth["to_layers"]) == ("growth", 3, 3, 12)
    assert "loss" not in growth
    assert growth["loss_before"] != growth["loss_after"]
    before = lines[lines.index(growth) - 1]
    assert before["step"] == 3
    assert "validation_loss" in before, "the small model is validated just before it grows"
    steps = [line for line in lines if "num_layers" in line]
    assert [line["num_layers"] for line in steps] == [3, 3, 3, 12, 12, 12]
    per_token = [steps[2]["flops"] / steps[2]["tokens"], (steps[5]["flops"] - steps[2]["flops"]) / (3 * 8 * 32)]
    layer_flops = 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 256 + 2 * 32) + 12 * 32 * 32
    assert per_token[1] - per_token[0] == pytest.approx(9 * layer_flops)


def test_continue_keeps_the_ungrown_runs_learning_rate(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """`continue` follows the curve of the same run without growth; `restart` warms up again."""
    curves = {}
    for policy in ("continue", "restart"):
        warm_ranks(train, 1, 1, make_recipe(tmp_path / policy, **growing(lr=policy)))
        curves[policy] = [line["lr"] for line in read_metrics(tmp_path / policy) if "lr" in line]
    scratch = growing() | {"growth__enable": False}
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "scratch", **scratch))
    lines = read_metrics(tmp_path / "scratch")
    assert all(line["num_layers"] == 12 for line in lines), "growth.enable = false trains the target from scratch"
    assert curves["continue"] == [line["lr"] for line in lines]
    assert curves["restart"][:3] == curves["continue"][:3]
    assert curves["restart"][3] == pytest.approx(0.5e-2)


def test_two_growths_by_tokens_chain_to_the_target(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """1 -> 2 -> 4 layers, each after the first step that reaches the token count."""
    stages = '[{at = "300 tokens", factor = 2, lr_policy = "continue"}, {at = "1K tokens", factor = 2}]'
    settings = {"checkpoint__enable": True, "checkpoint__interval": 100, "growth__stages": stages}
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "run", **settings))
    lines = read_metrics(tmp_path / "run")
    assert [(line["step"], line["to_layers"]) for line in lines if "event" in line] == [(2, 2), (4, 4)]
    assert [line["num_layers"] for line in lines if "num_layers" in line] == [1, 1, 2, 2, 4, 4]


def corrupted(rank: int, num_ranks: int, recipe: Any) -> None:
    """Trains with a reader that takes one layer from the wrong source."""
    from titan_growth.growth import apply as module

    honest = module.read_grown

    class WrongRules(Rules):
        def of(self, name: str) -> Rule:
            return super().of(name.replace("layers.0.", "layers.1."))

    def dishonest(reader: Any, tensors: Any, rules: Rules, **more: Any) -> None:
        honest(reader, tensors, WrongRules(rules.growth_map, rules.planned, rules.family), **more)

    module.read_grown = dishonest
    train(rank, num_ranks, recipe)


def test_a_wrong_read_is_caught(tmp_path: Path) -> None:
    """Verification does not trust the reader: layer 0 read from layer 1 aborts the run on every rank."""
    with pytest.raises(AssertionError, match=r"the grown model is wrong: .*differs from its source layers\.0\."):
        run_ranks(corrupted, 2, 2, make_recipe(tmp_path / "run", **growing()))


def test_a_diverged_model_is_not_saved(tmp_path: Path) -> None:
    """Even if the step before the growth is not logged, a non-finite model is not saved as its source."""
    settings = growing(metrics__log_freq=100, optimizer__lr=1e30, lr_scheduler__warmup_steps=0)
    with pytest.raises(AssertionError, match=r"step 3: .*Nothing was saved from here"):
        run_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings))
    assert not list((tmp_path / "run").glob("checkpoint/step-*"))


def test_a_growth_that_never_came_is_a_failure(tmp_path: Path) -> None:
    """Masked targets do not count as tokens, so a count can be missed; the run must not count as finished."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(300):
        (texts / f"{number:03}.txt").write_text(f"text {number} is short")
    settings = growing(data__document_mask=True, training__dataset_path=str(texts))
    settings["growth__stages"] = '[{at = "1278 tokens", factor = 4}]'
    with pytest.raises(AssertionError, match=r"the growth at 1,278 tokens never came.*Raise training\.steps"):
        run_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings))


def test_checkpoints_at_a_growth_are_kept(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """keep_latest_k counts only the others."""
    settings = growing(training__steps=12, checkpoint__interval=2, checkpoint__keep_latest_k=2)
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings))
    folders = {path.name for path in (tmp_path / "run" / "checkpoint").glob("*-*")}
    assert folders == {"step-3", "step-10", "step-12"}
