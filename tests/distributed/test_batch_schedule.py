"""A batch schedule under warmup-stable-decay with a growth in tokens: plan against run, and resumes in each stretch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import MESHES, slow_ones
from tests.distributed.test_parity import Trained, assert_agrees_with_one_rank
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_steps, train
from titan_growth.commands.plan_report import report_lines
from titan_growth.config.schema.recipe import Recipe
from titan_growth.run.plan import plan_run
from titan_growth.tools.findings import Findings

PEAK = 1e-2
POINT = re.compile(r"step (\d+) \(([\d,]+) tokens\)")
SETTINGS = {
    "training__steps": 12,
    "training__batch_schedule__0__at": "1000 tokens",
    "training__batch_schedule__0__global_batch_size": 32,
    "lr_scheduler__decay_ratio": 0.3,
    "growth__stages__0__at": "3000 tokens",
    "growth__stages__0__factor": 2,
    "growth__stages__0__optimizer_state": "copy",
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "checkpoint__keep_latest_k": 0,
    "debug__log_batch_hash": True,
}
"""8 x 32 tokens for 4 steps, then 32 x 32; warmups of 2 steps, from step 1 and from the growth after step 6."""


def recipe_of(folder: Path, **others: Any) -> Recipe:
    return make_recipe(folder, **{**SETTINGS, **others})


@pytest.fixture(scope="module")
def whole(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks that was never interrupted."""
    folder = tmp_path_factory.mktemp("batch") / "whole"
    warm_ranks(train, 2, 2, recipe_of(folder))
    return folder


def test_the_run_does_what_the_plan_says(whole: Path) -> None:
    made = plan_run(recipe_of(whole), Findings(), num_ranks=2, device_type="cpu")
    assert made is not None
    lines = report_lines(made, "cpu")
    found = lines[lines.index("learning rate (measured in tokens, masked positions included):") + 1 :][:2]
    planned = [[(int(step), int(tokens.replace(",", ""))) for step, tokens in POINT.findall(line)] for line in found]
    run = read_steps(whole)
    at = [(line["step"], line["tokens"]) for line in run]
    lr = [line["lr"] for line in run]
    grown = next(line["step"] for line in run if line["num_layers"] == 4) - 1
    first, second = lr[:grown], lr[grown:]
    below = [number for number, rate in enumerate(second) if number > second.index(PEAK) and rate < PEAK]
    # The first step of a decay is still at the peak: the decay begins at the end of the step before it.
    decay = grown + below[0] - 2
    assert planned == [[at[first.index(PEAK)], at[grown - 1]], [at[grown + second.index(PEAK)], at[decay], at[-1]]]
    assert at[-1] == (12, 4 * 8 * 32 + 8 * 32 * 32)
    assert first == pytest.approx([PEAK / 2, *[PEAK] * 5])
    assert second == pytest.approx([PEAK / 2, PEAK, PEAK, PEAK, PEAK * 2 / 3, PEAK / 3])


def resumed(warm_ranks: WarmRanks, whole: Path, folder: Path, step: int, num_ranks: int) -> list[dict[str, Any]]:
    """The steps after a resume from one of the run's checkpoints."""
    shutil.copytree(whole, folder)
    local = {1: 8, 2: 2, 4: 2}[num_ranks]
    recipe = recipe_of(folder, checkpoint__load_step=step, training__local_batch_size=local)
    warm_ranks(train, num_ranks, num_ranks, recipe)
    lines = read_steps(folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    return lines


def require_same(whole: Path, lines: list[dict[str, Any]], *, exact: bool) -> None:
    expected = read_steps(whole)
    for key in ("batch_hash", "tokens", "lr", "num_layers"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in lines] == (losses if exact else pytest.approx(losses, abs=2e-5))


def test_a_resume_before_the_change_on_other_ranks(warm_ranks: WarmRanks, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes((whole.parent / "corpus.txt").read_bytes())
    require_same(whole, resumed(warm_ranks, whole, tmp_path / "run", 2, 1), exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
def test_resumes_in_every_stretch(
    warm_ranks: WarmRanks, whole: Path, tmp_path: Path, step: int, num_ranks: int
) -> None:
    (tmp_path / "corpus.txt").write_bytes((whole.parent / "corpus.txt").read_bytes())
    require_same(whole, resumed(warm_ranks, whole, tmp_path / "run", step, num_ranks), exact=num_ranks == 2)


ON_MESHES = ("pp2", "tp2", "cp2", "fsdp2 x tp2", "pp2 x fsdp2", "pp2 x tp2", "pp2 x cp2", "cp2 x fsdp2", "cp2 x tp2")
GROWING_BATCH = {
    "training__steps": 6,
    "training__batch_schedule__0__at": "512 tokens",
    "training__batch_schedule__0__global_batch_size": 16,
    "training__batch_schedule__1__at": "4 steps",
    "training__batch_schedule__1__global_batch_size": 24,
    "lr_scheduler__decay_ratio": 0.6,
    "model__n_layers": 2,
    "debug__log_batch_hash": True,
}
"""8 x 32 tokens for 2 steps, 16 x 32 for 2, and 24 x 32 for 2, under a warmup of 2 steps and a decay in tokens."""


@pytest.mark.parametrize("name", slow_ones(ON_MESHES, *ON_MESHES[1:]))
def test_meshes_agree_with_one_rank(name: str, trained: Trained) -> None:
    """The same sequences, learning rates and losses: what grows is how many batches of the mesh are accumulated."""
    case = MESHES[name]
    lines = assert_agrees_with_one_rank(case, trained, **GROWING_BATCH)
    expected = trained(1, **GROWING_BATCH, training__local_batch_size=8)
    assert [line["tokens"] for line in lines] == [256, 512, 1024, 1536, 2304, 3072]
    for key in ("batch_hash", "tokens", "lr"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
    assert lines[-1]["lr"] < PEAK == lines[2]["lr"]
