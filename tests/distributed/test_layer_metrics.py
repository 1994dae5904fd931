"""What the layers do: one rank against plain PyTorch, and every mesh and technique against one rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.meshes import MESHES, ONE_RANK, QWEN3, slow_ones
from tests.harness import WarmRanks
from tests.runs import make_recipe, train
from titan_growth.models.attention_logits import max_logits
from titan_growth.stages.attention_observer import ObservedSequence
from titan_growth.stages.context_parallel import ShardedSequence, positions_by_rank

Lines = list[dict[str, Any]]
Measured = Callable[..., Lines]

RUN: dict[str, Any] = {
    "training__steps": 2,
    "model__n_layers": 2,
    "metrics__layers_freq": 1,
    "metrics__attention_freq": 1,
}


COMPILED = {"compile__enable": True, "compile__backend": "aot_eager"}


@pytest.fixture(scope="module")
def measured(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """`measured(num_ranks, **settings)`: the layers.jsonl of that run, trained once per file."""
    folder = tmp_path_factory.mktemp("measured")
    known: dict[str, Lines] = {}

    def lines_of(num_ranks: int, **settings: Any) -> Lines:
        key = json.dumps([num_ranks, settings], sort_keys=True)
        if key not in known:
            recipe = make_recipe(folder / f"run-{len(known)}", **RUN | settings)
            warm_ranks(train, num_ranks, num_ranks, recipe, timeout_seconds=250)
            known[key] = read_layers(folder / f"run-{len(known)}")
        return known[key]

    return lines_of


def read_layers(folder: Path) -> Lines:
    return [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]


def flat(line: dict[str, Any]) -> dict[str, float]:
    """Every number of a line, by metric, group and layer."""
    found = {}
    for metric, by_group in line["layers"].items():
        for group, values in by_group.items():
            for at, value in enumerate(values if isinstance(values, list) else [values]):
                found[f"{metric}.{group}.{at}"] = value
    return found


def assert_same(found: Lines, expected: Lines, *, later: float = 1e-4) -> None:
    """All numbers of the first step to 1e-5 relative, and those of the later ones to 1e-4."""
    assert [line["step"] for line in found] == [line["step"] for line in expected] != []
    for line, reference in zip(found, expected, strict=True):
        tolerance = 1e-5 if line["step"] == 1 else later
        assert flat(line) == pytest.approx(flat(reference), rel=tolerance), f"step {line['step']}"


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@pytest.mark.parametrize("name", slow_ones(["fsdp2", "tp2", "pp2", "cp2", "fsdp2 x tp2"], "fsdp2 x tp2"))
def test_meshes_agree_with_one_rank(name: str, family: str, measured: Measured) -> None:
    model = QWEN3 if family == "qwen3" else {}
    case = MESHES[name]
    assert_same(measured(case.num_ranks, **model, **case.layout), measured(1, **model, **ONE_RANK.layout))


TECHNIQUES: dict[str, tuple[str, dict[str, Any]]] = {
    "recomputed layers": ("1 rank", {"activation_checkpoint__mode": "full"}),
    "recomputed operations": (
        "1 rank",
        {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"},
    ),
    "compiled": ("1 rank", COMPILED),
    "compiled, recomputed layers": ("1 rank", COMPILED | {"activation_checkpoint__mode": "full"}),
    "compiled, recomputed layers, tp2": ("tp2", COMPILED | {"activation_checkpoint__mode": "full"}),
    "recomputed layers, tp2": ("tp2", {"activation_checkpoint__mode": "full"}),
    "compiled, cp2": ("cp2", COMPILED),
    "accumulated": ("1 rank", {"training__local_batch_size": 2}),
    "chunked loss, tp2": ("tp2, chunked loss", {}),
}


@pytest.mark.usefixtures("warm_imports")
@pytest.mark.parametrize("name", slow_ones(TECHNIQUES, "compiled, recomputed layers, tp2", "compiled, cp2"))
def test_techniques_change_nothing(name: str, measured: Measured) -> None:
    mesh, settings = TECHNIQUES[name]
    case = {"1 rank": ONE_RANK, **MESHES}[mesh]
    assert_same(measured(case.num_ranks, **case.layout | settings), measured(1, **ONE_RANK.layout))


@pytest.mark.usefixtures("warm_imports")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_inductor_changes_nothing(mode: str, measured: Measured) -> None:
    settings = {"compile__enable": True, "activation_checkpoint__mode": mode}
    assert_same(measured(1, **ONE_RANK.layout | settings), measured(1, **ONE_RANK.layout))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if MESHES[name].num_ranks <= 4])
def test_more_meshes_agree_with_one_rank(name: str, measured: Measured) -> None:
    case = MESHES[name]
    settings = {"model__n_layers": 4, **case.model}
    assert_same(measured(case.num_ranks, **settings | case.layout), measured(1, **settings | ONE_RANK.layout))


FLOAT8_SIZES = {"model__dim": 64, "model__vocab_size": 288}
FLOAT8 = {"model__converters": ["quantize.linear.float8"]}
KIND = "quantize__linear__float8__"
FLOAT8_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "1 rank": ("1 rank", {}),
    "1 rank, rowwise": ("1 rank", {f"{KIND}recipe_name": "rowwise"}),
    "fsdp2, gathered": ("fsdp2", {f"{KIND}enable_fsdp_float8_all_gather": True}),
    "tp2": ("tp2", {}),
    "pp2": ("pp2", {}),
    "cp2": ("cp2", {}),
    "compiled": ("1 rank", COMPILED),
}


@pytest.mark.usefixtures("warm_imports")
@pytest.mark.parametrize("name", slow_ones(FLOAT8_KINDS, "1 rank, rowwise", "tp2", "pp2", "cp2", "compiled"))
def test_float8_is_measured(name: str, measured: Measured) -> None:
    """Weights as they are stored, before any cast; the rest is near the numbers of the same run without Float8."""
    mesh, settings = FLOAT8_KINDS[name]
    case = {"1 rank": ONE_RANK, **MESHES}[mesh]
    found = measured(case.num_ranks, **FLOAT8_SIZES, **FLOAT8, **settings, **case.layout)[0]
    expected = measured(1, **FLOAT8_SIZES, **ONE_RANK.layout)[0]
    for metric, tolerance in (
        ("weight_norm", 1e-6),
        ("activation_rms", 5e-2),
        ("gradient_norm", 1e-1),
        ("update_ratio", 1e-1),
    ):
        numbers, exact = (flat({"layers": {metric: line["layers"][metric]}}) for line in (found, expected))
        assert numbers == pytest.approx(exact, rel=tolerance), metric
    assert found["layers"]["gradient_norm"] != expected["layers"]["gradient_norm"], "Float8 is off"
    assert found["layers"].keys() == expected["layers"].keys()


def ring_logits(rank: int, balancer: str) -> tuple[list[float], list[float]]:
    """(the largest logit of each head, this rank's share of it) with its own keys alone, as under ring attention."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, 4, 8, generator=generator), torch.randn(2, 16, 2, 8, generator=generator)
    q[0, 0] = 30 * k[0, 9].repeat_interleave(2, dim=0)  # not allowed
    sequence = ShardedSequence(
        rank=rank, degree=2, balancer=balancer, group=dist.group.WORLD, ring=True, hidden_shards=1
    )
    observed = ObservedSequence(sequence, num_heads=4)
    observed.wanted.append(lambda: True)
    tables = torch.zeros(16, 4)
    context = observed.context(tables, tables, 8, None)
    own = positions_by_rank(16, 2, balancer)[rank]
    assert context.observer is not None
    context.observer(q[:, own], k[:, own], None)
    assert observed.last_N is not None
    return max_logits(q, k).tolist(), observed.last_N.tolist()


@pytest.mark.parametrize("balancer", ["headtail", "none"])
def test_keys_of_ring_attention_are_gathered(balancer: str, warm_ranks: WarmRanks) -> None:
    """CUDA only in a run; what is measured needs no CUDA."""
    found = warm_ranks(ring_logits, 2, balancer)
    assert [max(both) for both in zip(*(own for _, own in found), strict=True)] == pytest.approx(found[0][0], rel=1e-6)
    assert found[0][1] != found[1][1]
