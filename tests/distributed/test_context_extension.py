"""Growths that keep the model's size: longer sequences and another rotary base, on every mesh the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import GLOBAL_BATCH, MESHES, QWEN3, slow_ones
from tests.distributed.test_parity import Trained
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_steps, train
from titan_growth.commands.foreign import open_with_recipe
from titan_growth.run.plan import plan_run
from titan_growth.tools.findings import Findings

STAGE = {
    "at": "3 steps",
    "operator": "identity",
    "optimizer_state": "copy",
    "lr_policy": "continue",
}
KEPT = {f"growth__stages__0__{key}": value for key, value in STAGE.items()}
EXTENDED = {
    **KEPT,
    "growth__stages__0__seq_len": 64,
    "growth__stages__0__rope_theta": 500000.0,
    "growth__base__rope_theta": 100.0,
    "model__rope_theta": 500000.0,
    "lr_scheduler__warmup_steps": 0,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "checkpoint__keep_latest_k": 0,
}
ALONE = {"training__local_batch_size": GLOBAL_BATCH}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("fsdp2", {}),
    "cp2": ("cp2", {}),
    "tp2": ("tp2", {}),
    "pp2": ("pp2", {}),
    "hsdp 2x2": ("hsdp 2x2", {}),
    "pp2 x fsdp2 x tp2": ("pp2 x fsdp2 x tp2", {}),
    "fsdp2, Muon": ("fsdp2", {"optimizer__name": "Muon", "optimizer__lr": 5e-3}),
    "fsdp2, document masks": ("fsdp2", {"data__document_mask": True}),
    "qwen3: fsdp2 x tp2": ("fsdp2 x tp2", QWEN3),
}


@pytest.mark.parametrize("name", slow_ones(CASES, *(name for name in CASES if name != "cp2")))
def test_meshes_agree_with_one_rank(name: str, trained: Trained) -> None:
    """Losses to 1e-5 before and after; from the growth on a step has twice the tokens, less what documents mask."""
    where, settings = CASES[name]
    case = MESHES[where]
    alone, spread = (
        [line for line in trained(ranks, **EXTENDED | settings, **layout) if "grad_norm" in line]
        for ranks, layout in ((1, ALONE), (case.num_ranks, case.layout))
    )
    assert [line["loss"] for line in spread] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    tokens = [line["tokens"] for line in spread]
    per_step = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    assert per_step == pytest.approx([256] * 3 + [512] * 3, rel=0.05 if "data__document_mask" in settings else 0)


def test_nothing_else_happens(warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """Where it changes nothing that counts, the run is bit for bit the one without it."""
    plain = make_recipe(tmp_path / "plain", checkpoint__enable=True, **ALONE)
    kept = {**KEPT, "growth__stages__0__global_batch_size": GLOBAL_BATCH}
    grown = make_recipe(tmp_path / "grown", checkpoint__enable=True, **kept, **ALONE)
    for recipe in (plain, grown):
        warm_ranks(train, 1, 1, recipe)
    losses = [[line["loss"] for line in read_steps(tmp_path / name)] for name in ("plain", "grown")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_checkpoints_know_their_base_and_resume(warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """Each phase's step folder names its own base of the frequencies, and every one of them resumes to the same end."""
    folder = tmp_path / "run"
    warm_ranks(train, 1, 1, make_recipe(folder, **EXTENDED, **ALONE))
    steps = {step: folder / "checkpoint" / f"step-{step}" for step in (2, 3, 4)}
    assert {step: open_with_recipe(path, None).config.rope_theta for step, path in steps.items()} == {
        2: 100.0,
        3: 100.0,
        4: 500000.0,
    }
    expected = [line["loss"] for line in read_steps(folder)]
    for step in steps:
        warm_ranks(train, 1, 1, make_recipe(folder, **EXTENDED, **ALONE, checkpoint__load_step=step))
        assert [line["loss"] for line in read_steps(folder)] == expected


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (
            {**KEPT, "checkpoint__enable": True},
            "growth.stages.0",
            "changes nothing. Give seq_len, rope_theta, a batch size, parallelism or num_ranks",
        ),
        (
            {**EXTENDED, "growth__stages__0__noise": 0.1},
            "growth.stages.0",
            "copies nothing that noise could be added to. Remove noise",
        ),
        (
            {**EXTENDED, "growth__stages__0__lr_policy": "rewarm_new"},
            "growth.stages.0",
            'adds no parameters that lr_policy "rewarm_new" could warm up. Use "rewarm", or "continue"',
        ),
        (
            {**EXTENDED, "growth__stages__0__factor": 2},
            "growth.stages.0.factor",
            "has no meaning for 'identity', which changes no size",
        ),
        (
            {**EXTENDED, "model__rope_theta": 1e6},
            "growth.stages",
            "the growths do not end at the model of [model]: they end at rope_theta = 500000.0 instead of 1000000.0",
        ),
        (
            {**EXTENDED, "growth__base__rope_theta": 500000.0},
            "growth.stages.0.rope_theta",
            "is what the model has by then",
        ),
    ],
    ids=["nothing", "noise", "nothing new", "factor", "another end", "the same"],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], key: str, message: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", **settings, **ALONE)
    assert plan_run(recipe, found := Findings(), num_ranks=1, device_type="cpu") is None
    assert [(problem.key, problem.message) for problem in found.problems] == [(key, message)]
