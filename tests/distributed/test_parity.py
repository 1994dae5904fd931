"""Every mesh computes what one rank computes, from the same weights and the same global batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.runs import make_recipe, read_metrics, train

MESHES = {
    "fsdp2": (2, {}),
    "fsdp4": (4, {}),
    "hsdp 2x2": (4, {"parallelism__data_parallel_replicate_degree": 2}),
    "ddp2": (2, {"parallelism__data_parallel_replicate_degree": 2, "parallelism__data_parallel_shard_degree": 1}),
    "fsdp4, uneven shards": (4, {"model__dim": 36, "model__n_heads": 6, "model__hidden_dim": 90}),
    "fsdp2, masked documents": (2, {"data__document_mask": True}),
    "fsdp2, never reshard": (2, {"parallelism__fsdp_reshard_after_forward": "never"}),
    "fsdp2, tied head": (2, {"model__tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_grad_norm_agree_with_one_rank(name: str, tmp_path: Path) -> None:
    """Step 1 to 1e-5 relative in fp32, 20 steps to 1e-4; gradient accumulation differs between the two as well."""
    num_ranks, overrides = MESHES[name]
    model = {key: value for key, value in overrides.items() if not key.startswith("parallelism")}
    one = make_recipe(tmp_path / "one", training__steps=20, **model)
    many = make_recipe(tmp_path / "many", training__steps=20, **overrides)
    run_ranks(train, 1, 1, one)
    run_ranks(train, num_ranks, num_ranks, many)
    expected, found = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "many")
    assert [line["step"] for line in found] == list(range(1, 21))
    for reference, line in zip(expected, found, strict=True):
        tolerance = 1e-5 if line["step"] == 1 else 1e-4
        assert line["loss"] == pytest.approx(reference["loss"], rel=tolerance)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=tolerance)
        assert line["tokens"] == reference["tokens"]
    assert found[-1]["loss"] < found[0]["loss"] - 0.5, "the run does not learn"


def test_gradient_accumulation_changes_nothing(tmp_path: Path) -> None:
    """One microbatch of 8 sequences against four of 2, on one rank: 1e-5 relative."""
    whole = make_recipe(tmp_path / "whole", training__local_batch_size=8)
    parts = make_recipe(tmp_path / "parts", training__local_batch_size=2)
    run_ranks(train, 1, 1, whole)
    run_ranks(train, 1, 1, parts)
    for reference, line in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"), strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
