"""The throughput benchmark: its figures follow from its samples, and what is not possible is said and not started."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import throughput
from benchmarks.throughput_cases import SIZES, Case, default_cases, groups_of, plan_case, selected, size_of
from benchmarks.throughput_ranks import CaseFailedError, ForkedCase
from benchmarks.throughput_running import PHASES

RECIPE = """
[model]
flavor = "custom"
dim = 32
n_layers = 2
n_heads = 4
vocab_size = 64

[optimizer]
lr = 1e-2

[training]
seq_len = 16
local_batch_size = 8
global_batch_size = 8

[activation_checkpoint]
mode = "none"
"""

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are forked only where there is no GPU")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.slow
@needs_cpu
def test_benchmark_figures_follow_from_the_samples(tmp_path: Path, recipe: str) -> None:
    own = [
        *("--case", "chunked=--training.loss_chunk_tokens 32"),
        *("--case", "no autocast=--parallelism.data_parallel_shard_degree 2 --training.mixed_precision_param float32"),
        *("--case", "impossible=--parallelism.tensor_parallel_degree 3"),
    ]
    options = ["--recipes", recipe, *own, "--threads", "1", "--steps", "2", "--repeats", "3"]
    assert throughput.main([*options, "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["settings"]["repeats"] == 3
    assert document["environment"]["torch"] == torch.__version__
    cases = {entry["name"]: entry for entry in document["cases"]}
    assert list(cases) == ["baseline", "chunked", "fsdp 2", "no autocast", "fsdp 3", "impossible"]
    for name in ("fsdp 3", "impossible"):  # neither a batch of 8 nor 4 heads can be shared by 3
        assert cases[name]["status"] == "refused"
        assert cases[name]["reasons"]
        assert "tokens_per_second" not in cases[name]
    for name in ("baseline", "chunked", "fsdp 2", "no autocast"):
        check(cases[name], cases)
    assert cases["fsdp 2"]["mesh"] == "dp_shard 2"
    losses = [cases[name]["loss"] for name in ("baseline", "chunked", "fsdp 2")]
    assert max(losses) - min(losses) < 2e-3 * min(losses)
    assert min(losses) < 4.1  # log(64) = 4.16 before the first step: they have learned
    page = (tmp_path / "out.md").read_text()
    assert "| chunked |" in page
    assert "impossible: **refused**" in page
    assert "off:" not in page


def check(entry: dict[str, Any], cases: dict[str, dict[str, Any]]) -> None:
    """One measured case."""
    samples = entry["samples"]
    assert len(samples) == 3
    assert entry["num_steps"] == 1 + 3 * (1 + 2)
    for sample in samples:
        assert sample["tokens"] == 2 * 8 * 16
        assert sample["tokens_per_second"] == pytest.approx(sample["tokens"] / sample["seconds"])
        for phases in sample["phase_seconds_by_rank"]:
            assert set(phases) == set(PHASES)
            assert 0 < 2 * sum(phases.values()) <= sample["seconds"]
    speeds = [sample["tokens_per_second"] for sample in samples]
    speed = entry["tokens_per_second"]
    assert speed == median(speeds)
    assert entry["tokens_per_second_per_rank"] == speed / entry["ranks"]
    assert entry["spread"] == pytest.approx((max(speeds) - min(speeds)) / speed)
    assert entry["mfu"] == pytest.approx(speed * entry["flops_per_token"] / entry["peak_flops"])
    baseline = [sample["tokens_per_second"] for sample in cases[entry["baseline"]]["samples"]]
    ratios = [mine / other for mine, other in zip(speeds, baseline, strict=True)]
    assert entry["ratio"] == pytest.approx(median(ratios))
    assert len(entry["memory_gib_by_rank"]) == entry["ranks"]
    assert 0 < entry["memory_gib"] < 4
    assert entry["first_step_seconds"] > 0


@needs_cpu
def test_benchmark_case_whose_rank_dies_fails_and_is_cleaned_up(recipe: str) -> None:
    planned = plan_case(Case(size_of(recipe), "2 ranks", "fsdp 2", 2), "cpu")
    assert planned.plan is not None
    running = ForkedCase(planned.plan, threads=1, timeout_seconds=60)
    processes = list(running._processes)
    processes[1].kill()
    try:
        with pytest.raises(CaseFailedError, match="a rank died"):
            running.start()
    finally:
        running.stop()
    assert not any(process.is_alive() for process in processes)


def test_benchmark_default_cases_are_possible() -> None:
    for size in SIZES.values():
        for ranks in (1, 2, 8):
            for case in default_cases(size, ranks, "cpu", cores=2):
                assert plan_case(case, "cpu").plan is not None, case.title


def test_benchmark_cases_of_a_recipe_on_gpus_keep_its_batch() -> None:
    cases = default_cases(size_of("train_configs/llama3_8b.toml"), 8, "cuda", cores=64)
    plans = {case.name: plan_case(case, "cuda").plan for case in cases}
    assert {plan.phase.tokens_per_step for plan in plans.values() if plan is not None} == {8 * 8192}
    assert plans["pp 2 x fsdp 2 x tp 2"] is not None
    # Per-operation checkpointing, which the recipe has, does not go with split backward passes.
    assert plans["pp 2 x fsdp 4 ZBVZeroBubble"] is None


def test_benchmark_selection_keeps_what_cases_are_compared_with() -> None:
    cases = default_cases(SIZES["small"], 1, "cpu", cores=2)
    names = [case.name for group in groups_of(selected(cases, ["compile"])) for case in group]
    assert names == ["plain fp32", "bf16", "bf16 + compile"]
