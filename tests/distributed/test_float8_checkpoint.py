"""Checkpoints of runs with Float8 all-gathers hold plain tensors, and resume without Float8."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from tests.distributed.meshes import mesh
from tests.harness import run_ranks
from tests.runs import make_recipe, read_metrics, train
from titan_growth.checkpoint.reader import SafeReader

GATHERED = {
    "model__converters": ["quantize.linear.float8"],
    "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
}
COMMON = {
    "model__dim": 64,
    "model__vocab_size": 288,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "lr_scheduler__total_steps": 6,
}


def test_a_checkpoint_of_gathered_float8_is_plain_and_resumes_without_it(tmp_path: Path) -> None:
    case = mesh(shard=2)
    run_ranks(train, 2, 2, make_recipe(tmp_path, **COMMON, **case.layout, **GATHERED, training__steps=2))
    reader = SafeReader(tmp_path / "checkpoint" / "step-2")
    for name, pieces in reader.chunks().items():
        for piece in pieces:
            assert type(reader.read_chunk(piece)) is torch.Tensor, name
            archive = (reader.folder / piece.file).read_bytes()[piece.begin : piece.begin + piece.length]
            stored = torch.load(io.BytesIO(archive), weights_only=True)
            assert type(stored) is torch.Tensor, f"{name} is stored as a {type(stored).__name__}"
    run_ranks(train, 2, 2, make_recipe(tmp_path, **COMMON, **case.layout, **GATHERED, training__steps=4))
    run_ranks(train, 1, 1, make_recipe(tmp_path, **COMMON, **mesh().layout, training__steps=6))
    losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
