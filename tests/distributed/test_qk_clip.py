"""QK-clip in real runs: against plain PyTorch, on every kind of mesh, through growths and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.meshes import MESHES, ONE_RANK, mesh, slow_ones
from tests.distributed.test_parity import Trained, assert_agrees_with_one_rank
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, read_steps, train, trainer_of, without_timings
from titan_growth.config.schema.recipe import Recipe
from titan_growth.models.llama import apply_rope

THRESHOLD = 0.05
"""About half of the heads of the small model exceed it at first, and all of them later."""
SETTINGS: dict[str, Any] = {
    "training__steps": 3,
    "model__n_layers": 2,
    "optimizer__qk_clip": THRESHOLD,
    "lr_scheduler__warmup_steps": 0,
}
MUON = {"optimizer__name": "Muon", "optimizer__lr": 5e-3}
PROJECTIONS = ("attention.wq.weight", "attention.wk.weight")

Weights = dict[str, Tensor]


# ---- by hand ---------------------------------------------------------------------------------------------------------


class ByHand:
    """All logits of all heads at once, from what the projections give."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.products: dict[str, list[Tensor]] = {}
        for name, module in part.named_modules():
            if name.endswith((".wq", ".wk")):
                module.register_forward_hook(self._keep(self.products.setdefault(name, [])))

    @staticmethod
    def _keep(kept: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: kept.append(output.detach().clone())

    def largest(self, layer: int) -> Tensor:
        """The largest causal logit of each head, over all microbatches."""
        q, k = (torch.cat(self.products[f"layers.{layer}.attention.{one}"]) for one in ("wq", "wk"))
        q, k = (one.unflatten(-1, (heads, 8)) for one, heads in ((q, 4), (k, 2)))
        q, k = (apply_rope(one, self.part.rope_cos[: q.shape[1]], self.part.rope_sin[: q.shape[1]]) for one in (q, k))
        logits = torch.einsum("bsnh,btnh->bnst", q, k.repeat_interleave(2, dim=2)) / 8**0.5
        return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).amax(dim=(0, 2, 3))


def expected_weights(rank: int, recipe: Recipe, threshold: float | None) -> tuple[float, int, Weights]:
    """(threshold, number of heads above it, projections) of a step without QK-clip, with heads then scaled by hand."""
    with trainer_of(recipe, 1) as trainer:
        (part,) = trainer.runtime.engine.model.parts
        by_hand = ByHand(part)
        assert trainer.fit()
        largest = [by_hand.largest(layer) for layer in range(2)]
        threshold = threshold or torch.cat(largest).median().item()
        weights = {name: one.detach().clone() for name, one in part.named_parameters() if name.endswith(PROJECTIONS)}
        for layer, of_heads in enumerate(largest):
            for group in range(2):
                own = [min(1.0, threshold / of_heads[2 * group + head].item()) for head in (0, 1)]
                key = min(own) ** 0.5
                weights[f"layers.{layer}.attention.wk.weight"][8 * group : 8 * group + 8] *= key
                for head in (0, 1):
                    rows = slice(8 * (2 * group + head), 8 * (2 * group + head) + 8)
                    weights[f"layers.{layer}.attention.wq.weight"][rows] *= own[head] / key
        return threshold, int((torch.cat(largest) > threshold).sum()), weights


def whole_weights(rank: int, num_ranks: int, recipe: Recipe) -> Weights:
    """The projections at the end of a run, whole, of this rank's parts."""
    with trainer_of(recipe, num_ranks) as trainer:
        assert trainer.fit()
        return {
            name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone()
            for part in trainer.runtime.engine.model.parts
            for name, one in part.named_parameters()
            if name.endswith(PROJECTIONS)
        }


@pytest.mark.parametrize("optimizer", [{}, MUON], ids=["AdamW", "Muon"])
def test_against_plain_pytorch(optimizer: dict[str, Any], warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """After one step of 4 microbatches; the threshold is the median of the heads' largest logits."""
    settings = {**SETTINGS, **optimizer, "training__steps": 1}
    off = make_recipe(tmp_path / "off", **settings | {"optimizer__qk_clip": 0.0})
    ((threshold, num_above, expected),) = warm_ranks(expected_weights, 1, off, None)
    (found,) = warm_ranks(
        whole_weights, 1, 1, make_recipe(tmp_path / "on", **settings | {"optimizer__qk_clip": threshold})
    )
    assert found.keys() == expected.keys() != set()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=0)
    (line,) = read_steps(tmp_path / "on")
    assert line["qk_clipped_heads"] == num_above in (3, 4)
    assert line["qk_max_logit"] > threshold


# ---- meshes ----------------------------------------------------------------------------------------------------------

UNEVEN = "fsdp4, uneven shards"
"""Shards of 9 rows, and heads of 6."""
CASES = {name: MESHES[name] for name in ("fsdp2", "tp2", "pp2", "cp2", "ddp2 x tp2", UNEVEN, "cp2, masked documents")}
CASES["fsdp2 x tp2, compiled, recomputed"] = mesh(
    shard=2, tp=2, compile__enable=True, compile__backend="aot_eager", activation_checkpoint__mode="full"
)


def factors(rank: int, num_ranks: int, off: Recipe, on: Recipe) -> Weights:
    """By how much QK-clip has scaled each row of the projections of this rank's parts, in a run of one step."""
    without, clipped = (whole_weights(rank, num_ranks, recipe) for recipe in (off, on))
    return {name: weight.norm(dim=1) / without[name].norm(dim=1) for name, weight in clipped.items()}


@pytest.mark.parametrize("name", slow_ones(CASES, "ddp2 x tp2", "fsdp2 x tp2, compiled, recomputed"))
@pytest.mark.parametrize("optimizer", [{}, MUON], ids=["AdamW", "Muon"])
def test_meshes_agree_with_one_rank(
    name: str, optimizer: dict[str, Any], warm_ranks: WarmRanks, tmp_path: Path
) -> None:
    """The factor on every row to 1e-6, and the largest logit. (The optimizer's step alone differs by more.)"""
    case = CASES[name]
    settings = {**SETTINGS, **optimizer, **case.model, "training__steps": 1}
    found: list[Weights] = []
    for layout in (ONE_RANK, case):
        recipes = [
            make_recipe(tmp_path / f"{number}-{layout.num_ranks}", **settings | clip, **layout.layout)
            for number, clip in enumerate(({"optimizer__qk_clip": 0.0}, {}))
        ]
        found.append({})
        for of_rank in warm_ranks(factors, layout.num_ranks, layout.num_ranks, *recipes):
            found[-1] |= of_rank
    expected, other = found
    assert other.keys() == expected.keys() != set()
    for weight, rows in expected.items():
        assert (rows != 1).any()
        torch.testing.assert_close(other[weight], rows, rtol=1e-6, atol=0)
    (reference,), (line,) = (read_steps(tmp_path / f"1-{layout.num_ranks}") for layout in (ONE_RANK, case))
    assert line["qk_max_logit"] == pytest.approx(reference["qk_max_logit"], rel=1e-6)
    assert line["qk_clipped_heads"] == reference["qk_clipped_heads"] > 0


CLIPPED = [name for name in MESHES if "qwen3" not in name]
"""With QK-norm it is refused."""


@pytest.mark.parametrize("name", slow_ones(CLIPPED, *(name for name in CLIPPED if name != "tp2")))
def test_three_steps_agree_with_one_rank(name: str, trained: Trained) -> None:
    case = MESHES[name]
    settings = {key: value for key, value in SETTINGS.items() if key not in case.model}
    lines = assert_agrees_with_one_rank(case, trained, **settings)
    assert lines[2]["qk_clipped_heads"] > 0


# ---- what it leaves alone, growths and resumes -----------------------------------------------------------------------


def plain(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if "qk_" not in key} for line in without_timings(lines)]


@pytest.mark.parametrize("name", ["1 rank", "fsdp2", "tp2"])
def test_nothing_changes_below_the_threshold(name: str, trained: Trained) -> None:
    """A threshold out of reach and none at all: all numbers of the run, bit for bit."""
    case = {"1 rank": ONE_RANK, **MESHES}[name]
    off, far = (
        trained(case.num_ranks, **SETTINGS | {"optimizer__qk_clip": threshold}, **case.layout)
        for threshold in (0.0, 1e6)
    )
    assert plain(far) == plain(off)
    assert [line["qk_clipped_heads"] for line in far] == [0, 0, 0]
    assert "qk_max_logit" not in off[0]


def test_float8_scales_are_those_of_the_clipped_weights(trained: Trained) -> None:
    """Computed ahead, after the clipping, or at each gather: the same losses."""
    float8 = "quantize__linear__float8__"
    settings = {
        **SETTINGS | {"training__steps": 4, "optimizer__qk_clip": 0.005},
        "model__converters": ["quantize.linear.float8"],
        "model__dim": 64,
        "model__vocab_size": 288,
        f"{float8}enable_fsdp_float8_all_gather": True,
        **MESHES["fsdp2"].layout,
    }
    ahead, at_once = (
        trained(2, **settings, **{f"{float8}precompute_float8_dynamic_scale_for_fsdp": one}) for one in (True, False)
    )
    assert min(line["qk_clipped_heads"] for line in ahead) > 0
    assert [line["loss"] for line in ahead] == [line["loss"] for line in at_once]


def test_only_some_steps_are_looked_at(trained: Trained) -> None:
    """Those that the interval divides, counted by the run: a resume looks at the same ones."""
    lines = trained(1, **SETTINGS, optimizer__qk_clip_interval=2)
    off = trained(1, **SETTINGS | {"optimizer__qk_clip": 0.0})
    assert ["qk_max_logit" in line for line in lines] == [False, True, False]
    assert plain(lines)[:2] == plain(off)[:2]
    assert plain(lines)[2] != plain(off)[2]


def test_a_skipped_step_clips_nothing(trained: Trained) -> None:
    """Every step's gradient norm is a spike here once the window is full, and is skipped."""
    skipping = {
        "training__steps": 4,
        "stability__spike": "skip",
        "stability__spike_window": 8,
        "stability__spike_sigmas": 1e-9,
    }
    lines = trained(1, **SETTINGS | skipping)
    assert any("skipped" in line for line in lines)
    for line in lines:
        assert ("qk_max_logit" in line) != ("skipped" in line)


WIDER = {"dim": 64, "n_heads": 8, "n_kv_heads": 4}
GROWTHS: dict[str, dict[str, Any]] = {
    "depth": {"model__n_layers": 4, "growth__stages": '[{at = "2 steps", operator = "stack", factor = 2}]'},
    "width": {
        **{f"model__{key}": value for key, value in WIDER.items()},
        **{f"growth__base__{key}": value // 2 for key, value in WIDER.items()},
        "model__head_dim": 8,
        "growth__stages": '[{at = "2 steps", operator = "split_width", factor = 2, noise = 0.01}]',
    },
}


@pytest.mark.parametrize("growth", slow_ones(GROWTHS, "width"))
def test_a_grown_run_is_clipped_too(growth: str, warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """All heads of the grown model are seen, on one rank and on two."""
    lines = []
    for number, case in enumerate((ONE_RANK, MESHES["tp2"])):
        settings = {**SETTINGS, "training__steps": 4, "checkpoint__enable": True, **GROWTHS[growth], **case.layout}
        recipe = make_recipe(tmp_path / str(number), **settings)
        warm_ranks(train, case.num_ranks, case.num_ranks, recipe, timeout_seconds=250)
        lines.append(read_steps(tmp_path / str(number)))
    for line, reference in zip(*lines, strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert line["qk_max_logit"] == pytest.approx(reference["qk_max_logit"], rel=1e-3)
    assert max(line["qk_clipped_heads"] for line in lines[0][2:]) > 8, "more heads than the small model has"


def test_a_run_resumes_on_another_mesh(warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """Two steps on two pipeline ranks, then two on two tensor-parallel ones: as four on one."""
    whole = make_recipe(tmp_path / "whole", **SETTINGS | {"training__steps": 4}, **ONE_RANK.layout)
    warm_ranks(train, 1, 1, whole)
    saving = {"checkpoint__enable": True, "checkpoint__interval": 2, "lr_scheduler__total_steps": 4}
    for steps, name in ((2, "pp2"), (4, "tp2")):
        recipe = make_recipe(
            tmp_path / "parts", **SETTINGS | {"training__steps": steps}, **saving, **MESHES[name].layout
        )
        warm_ranks(train, 2, 2, recipe)
    for line, reference in zip(read_metrics(tmp_path / "parts"), read_metrics(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert line["qk_max_logit"] == pytest.approx(reference["qk_max_logit"], rel=1e-4)
