"""Every kind of mesh a model trains on, as settings of the recipe in `tests/runs.py`.

Shared by the parity test and by `tests/faults/parity.py`. All runs see the same global batches of 8 sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from titan_growth.layout.pipeline_layout import SCHEDULES

GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Case:
    """A mesh, how the model is laid out on it, and which model."""

    num_ranks: int
    layout: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    """Settings that the one-rank run gets too, because they change the numbers."""


def mesh(
    *,
    pp: int = 1,
    replicate: int = 1,
    shard: int = 1,
    cp: int = 1,
    tp: int = 1,
    schedule: str | None = None,
    model: dict[str, Any] | None = None,
    **layout: Any,
) -> Case:
    """A case by its degrees. A pipeline gets at least four microbatches, which every schedule accepts."""
    local_batch_size = GLOBAL_BATCH // (replicate * shard)
    degrees = {
        "pipeline_parallel_degree": pp,
        "data_parallel_replicate_degree": replicate,
        "data_parallel_shard_degree": shard,
        "context_parallel_degree": cp,
        "tensor_parallel_degree": tp,
    }
    settings: dict[str, Any] = {f"parallelism__{name}": degree for name, degree in degrees.items() if degree > 1}
    if replicate > 1:
        settings["parallelism__data_parallel_shard_degree"] = shard
    settings["training__local_batch_size"] = local_batch_size
    if pp > 1:
        settings["parallelism__pipeline_parallel_microbatch_size"] = max(1, local_batch_size // (2 * pp))
    if schedule is not None:
        settings["parallelism__pipeline_parallel_schedule"] = schedule
    return Case(pp * replicate * shard * cp * tp, {**settings, **layout}, model or {})


CHUNKED = {"training__loss_chunk_tokens": 20}
TIED = {"model__tie_word_embeddings": True}
DOCUMENTS = {"data__document_mask": True}
KV_HEADS_4 = {"model__n_kv_heads": 4}
UNEVEN = {"model__dim": 36, "model__n_heads": 6, "model__hidden_dim": 90}
ODD_VOCABULARY = {"model__vocab_size": 261}
FOUR_LAYERS = {"model__n_layers": 4}
FIVE_LAYERS = {"model__n_layers": 5}
EIGHT_LAYERS = {"model__n_layers": 8}
FIRST_LESS, LAST_LESS = (f"parallelism__pipeline_parallel_{which}_stage_less_layers" for which in ("first", "last"))
LAYERS_PER_PART = "parallelism__pipeline_parallel_layers_per_stage"
BY_NAME = [["tok_embeddings"], ["layers.0", "layers.1", "layers.2", "layers.3", "norm", "output"]]
CSV = str(Path(__file__).with_name("schedule_pp2.csv"))
QWEN3 = {"model__name": "qwen3", "model__head_dim": 16}

ONE_RANK = mesh()

MESHES: dict[str, Case] = {
    # One axis.
    "fsdp2": mesh(shard=2),
    "fsdp4": mesh(shard=4),
    "fsdp8": mesh(shard=8),
    "ddp2": mesh(replicate=2),
    "tp2": mesh(tp=2),
    "tp4": mesh(tp=4, model=KV_HEADS_4),
    "tp2, without loss parallel": mesh(tp=2, parallelism__disable_loss_parallel=True),
    "pp2": mesh(pp=2),
    "pp4": mesh(pp=4),
    "cp2": mesh(cp=2),
    "cp4": mesh(cp=4),
    "cp2, no load balancer": mesh(cp=2, parallelism__context_parallel_load_balancer="none"),
    # Two axes.
    "hsdp 2x2": mesh(replicate=2, shard=2),
    "fsdp2 x tp2": mesh(shard=2, tp=2),
    "ddp2 x tp2": mesh(replicate=2, tp=2),
    "pp2 x fsdp2": mesh(pp=2, shard=2),
    "pp2 x tp2": mesh(pp=2, tp=2),
    "pp2 x cp2": mesh(pp=2, cp=2),
    "cp2 x fsdp2": mesh(cp=2, shard=2),
    "cp2 x ddp2": mesh(cp=2, replicate=2),
    "cp2 x tp2": mesh(cp=2, tp=2),
    # Three axes.
    "pp2 x fsdp2 x tp2": mesh(pp=2, shard=2, tp=2),
    **{
        f"pp2 x fsdp2 x tp2, {schedule}": mesh(pp=2, shard=2, tp=2, schedule=schedule)
        for schedule in SCHEDULES
        if schedule != "1F1B"  # the default, just above
    },
    "hsdp 2x2 x cp2": mesh(replicate=2, shard=2, cp=2),
    "hsdp 2x2 x tp2": mesh(replicate=2, shard=2, tp=2),
    "pp2 x hsdp 2x2": mesh(pp=2, replicate=2, shard=2),
    "fsdp2 x cp2 x tp2": mesh(shard=2, cp=2, tp=2),
    "pp2 x cp2 x tp2, masked documents": mesh(pp=2, cp=2, tp=2, model=DOCUMENTS),
    # Schedules on two ranks.
    **{f"pp2, {schedule}": mesh(pp=2, schedule=schedule) for schedule in SCHEDULES if schedule != "1F1B"},
    "pp2, schedule from a file": mesh(pp=2, parallelism__pipeline_parallel_schedule_csv=CSV),
    # Resharding of gathered parameters.
    "fsdp2, never reshard": mesh(shard=2, parallelism__fsdp_reshard_after_forward="never"),
    "fsdp2, always reshard": mesh(shard=2, parallelism__fsdp_reshard_after_forward="always"),
    "pp2 x fsdp2, always reshard": mesh(pp=2, shard=2, parallelism__fsdp_reshard_after_forward="always"),
    "pp2 x fsdp2, always reshard, Interleaved1F1B": mesh(
        pp=2, shard=2, schedule="Interleaved1F1B", parallelism__fsdp_reshard_after_forward="always"
    ),
    # How the layers are split.
    "pp2, modules by name": mesh(pp=2, parallelism__module_fqns_per_model_part=BY_NAME, model=FOUR_LAYERS),
    "pp2, less layers 0 and 0": mesh(pp=2, **{FIRST_LESS: 0, LAST_LESS: 0}, model=FIVE_LAYERS),
    "pp2, less layers 2 and 1": mesh(pp=2, **{FIRST_LESS: 2, LAST_LESS: 1}, model=FIVE_LAYERS),
    "pp4, 5 layers": mesh(pp=4, model=FIVE_LAYERS),
    "pp2 x fsdp2, 4 parts a rank, Interleaved1F1B": mesh(
        pp=2,
        shard=2,
        schedule="Interleaved1F1B",
        model=EIGHT_LAYERS,
        **{FIRST_LESS: 0, LAST_LESS: 0, LAYERS_PER_PART: 1},
    ),
    "pp2 x fsdp2, 4 parts a rank, InterleavedZeroBubble": mesh(
        pp=2,
        shard=2,
        schedule="InterleavedZeroBubble",
        model=EIGHT_LAYERS,
        **{FIRST_LESS: 0, LAST_LESS: 0, LAYERS_PER_PART: 1},
    ),
    # Sizes that do not divide evenly over the ranks.
    "fsdp4, uneven shards": mesh(shard=4, model=UNEVEN),
    "tp2, odd vocabulary": mesh(tp=2, model=ODD_VOCABULARY),
    "tp2, odd vocabulary, without loss parallel": mesh(
        tp=2, model=ODD_VOCABULARY, parallelism__disable_loss_parallel=True
    ),
    "fsdp2 x tp2, odd vocabulary": mesh(shard=2, tp=2, model=ODD_VOCABULARY),
    # Document masks.
    "fsdp2, masked documents": mesh(shard=2, model=DOCUMENTS),
    "pp2, masked documents": mesh(pp=2, model=DOCUMENTS),
    "cp2, masked documents": mesh(cp=2, model=DOCUMENTS),
    "tp2, masked documents": mesh(tp=2, model=DOCUMENTS),
    # A tied head: one parameter, or two copies on two pipeline ranks or on one.
    "fsdp2, tied head": mesh(shard=2, model=TIED),
    "tp2, tied head": mesh(tp=2, model=TIED),
    "pp2, tied head": mesh(pp=2, model=TIED),
    "pp2, tied head, ZBVZeroBubble": mesh(pp=2, schedule="ZBVZeroBubble", model=TIED),
    "pp2 x fsdp2, tied head": mesh(pp=2, shard=2, model=TIED),
    "pp2 x tp2, tied head": mesh(pp=2, tp=2, model=TIED),
    "pp2 x fsdp2 x tp2, tied head": mesh(pp=2, shard=2, tp=2, model=TIED),
    # Head and loss in chunks.
    "1 rank, chunked loss": mesh(**CHUNKED),
    "fsdp2, chunked loss": mesh(shard=2, **CHUNKED),
    "tp2, chunked loss": mesh(tp=2, **CHUNKED),
    "pp2, chunked loss": mesh(pp=2, **CHUNKED),
    "cp2, chunked loss": mesh(cp=2, **CHUNKED),
    "tp2, chunked loss, odd vocabulary": mesh(tp=2, model=ODD_VOCABULARY, **CHUNKED),
    "fsdp2 x tp2, chunked loss, tied head": mesh(shard=2, tp=2, model=TIED, **CHUNKED),
    "pp2 x fsdp2 x tp2, chunked loss, ZBVZeroBubble": mesh(pp=2, shard=2, tp=2, schedule="ZBVZeroBubble", **CHUNKED),
    # The other family.
    "qwen3: fsdp2 x tp2": mesh(shard=2, tp=2, model=QWEN3),
    "qwen3: pp2 x tp2, tied head": mesh(pp=2, tp=2, model=QWEN3 | TIED),
    "qwen3: cp2 x fsdp2, tied head": mesh(cp=2, shard=2, model=QWEN3 | TIED),
    "qwen3: pp2 x fsdp2 x tp2, ZBVZeroBubble": mesh(pp=2, shard=2, tp=2, schedule="ZBVZeroBubble", model=QWEN3),
}

QUICK = (
    "fsdp2",
    "ddp2",
    "tp2",
    "tp2, without loss parallel",
    "pp2",
    "cp2",
    "hsdp 2x2",
    "pp2 x fsdp2",
    "pp2 x tp2",
    "pp2 x cp2",
    "cp2 x fsdp2",
    "pp2, Interleaved1F1B",
    "pp2, schedule from a file",
    "pp2, modules by name",
    "pp2, less layers 0 and 0",
    "pp2, less layers 2 and 1",
    "pp4, 5 layers",
    "fsdp4, uneven shards",
    "fsdp2, never reshard",
    "tp2, odd vocabulary",
    "pp2, masked documents",
    "cp2, masked documents",
    "tp2, masked documents",
    "fsdp2, tied head",
    "tp2, tied head",
    "pp2, tied head",
    "pp2, tied head, ZBVZeroBubble",
    "fsdp2, chunked loss",
    "tp2, chunked loss",
    "pp2, chunked loss",
)
"""One of each kind, for the default suite: few steps on few ranks. The whole table runs with `-m slow`.

`test_gradients.py` has fsdp2 x tp2 and cp2 x tp2.
"""


def slow_ones(names: Iterable[str], *slow: str) -> list[Any]:
    """Parameters of a test, of which the named ones are only run with the slow tests."""
    named = list(names)
    assert set(slow) <= set(named), f"there are no {set(slow) - set(named)}"
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in named]
