"""Reports about meshes: gradients, their norm and the loss on several ranks, against one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.meshes import DOCUMENTS, GLOBAL_BATCH, MESHES, ONE_RANK, Case, mesh
from tests.harness import WarmRanks
from tests.reported.one_batch import Batches, assert_clipped, assert_same
from tests.runs import make_recipe, read_metrics, train
from titan_growth.engine.optimizer import global_norm
from titan_growth.layout.pipeline_layout import SCHEDULES

slow = pytest.mark.slow
MAX_NORM = 0.01
CLIPPED = {"training__max_norm": MAX_NORM}


@pytest.fixture(scope="module")
def batches(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    return Batches(warm_ranks, tmp_path_factory.mktemp("batches"))


# ---- what the loss is divided by -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", ["1F1B", *(pytest.param(name, marks=slow) for name in SCHEDULES if name != "1F1B")]
)
def test_torchtitan_2972_pipelines_with_uneven_labels(schedule: str, batches: Batches) -> None:
    case = mesh(pp=2, schedule=schedule, model={**DOCUMENTS, "model__n_layers": 4})
    one_rank = Case(1, ONE_RANK.layout, case.model)
    found = batches(case, **CLIPPED)
    assert_same(found, batches(one_rank, **CLIPPED))
    assert_clipped(found, MAX_NORM)


def test_torchtitan_1733_pipelines_that_accumulate(batches: Batches) -> None:
    layout = {**mesh(pp=2).layout, "training__local_batch_size": GLOBAL_BATCH // 4}
    layout["parallelism__pipeline_parallel_microbatch_size"] = 1
    case = Case(2, layout, {**DOCUMENTS, "model__n_layers": 4})
    assert_same(batches(case, **CLIPPED), batches(Case(1, ONE_RANK.layout, case.model), **CLIPPED))


def test_transformers_35203_accumulation_with_uneven_labels(batches: Batches) -> None:
    parts = batches(Case(1, {"training__local_batch_size": 1}, DOCUMENTS), **CLIPPED)
    assert len(parts.labels) == GLOBAL_BATCH
    assert len(set(parts.labels)) > 1, "all microbatches have equally many labels"
    assert_same(parts, batches(Case(1, ONE_RANK.layout, DOCUMENTS), **CLIPPED))


def test_automodel_3359_microbatches_without_a_label(batches: Batches, tmp_path: Path) -> None:
    texts = ["x"] * 800 + ["a long document of many words " * 27]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"training__dataset_path": str(corpus), "data__bos": False, "data__eos": False, **DOCUMENTS, **CLIPPED}
    settings["data__validation_fraction"] = 0.0
    found = batches(Case(2, {"training__local_batch_size": 1}), **settings)
    assert 0 in found.labels
    assert 31 in found.labels or 32 in found.labels
    assert_same(found, batches(ONE_RANK, **settings))


def test_torchtitan_1759_validation_loss_under_accumulation(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    losses = []
    for parts in (1, 4):
        settings: dict[str, Any] = {"training__steps": 1, "validation__enable": True, "validation__local_batch_size": 4}
        settings["training__local_batch_size"] = GLOBAL_BATCH // parts
        warm_ranks(train, 1, 1, make_recipe(tmp_path / f"{parts}", **settings, model__n_layers=1, model__dim=16))
        losses.append(
            next(line["validation_loss"] for line in read_metrics(tmp_path / f"{parts}") if "loss" not in line)
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@slow
@pytest.mark.parametrize("name", ["pp2 x fsdp2", "fsdp4"])
def test_torchtitan_1618_a_validation_set_smaller_than_the_ranks(
    name: str, tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    (tmp_path / "held_out.txt").write_text("three sequences of text" + " and so on" * 8)
    settings: dict[str, Any] = {"validation__enable": True, "validation__dataset_path": str(tmp_path / "held_out.txt")}
    settings |= {"training__steps": 2, "validation__freq": 1, "validation__local_batch_size": 4, "model__dim": 16}
    losses = {}
    for case_name, case in (("one", ONE_RANK), ("many", MESHES[name])):
        recipe = make_recipe(tmp_path / case_name, **settings, **case.layout, model__n_layers=2)
        warm_ranks(train, case.num_ranks, case.num_ranks, recipe)
        lines = read_metrics(tmp_path / case_name)
        losses[case_name] = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses["one"]) == 2
    assert losses["many"] == pytest.approx(losses["one"], rel=1e-5)


# ---- one axis beside another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tp2", pytest.param("fsdp2 x tp2", marks=slow)])
@pytest.mark.parametrize("chunk_tokens", [7])  # does not divide the 32 positions
def test_torchtitan_3412_chunked_loss_under_tensor_parallelism(name: str, chunk_tokens: int, batches: Batches) -> None:
    found = batches(MESHES[name], **CLIPPED, training__loss_chunk_tokens=chunk_tokens)
    assert_same(found, batches(ONE_RANK, **CLIPPED))


@slow
def test_torchtitan_3329_logged_loss_of_tensor_and_context_parallelism(batches: Batches) -> None:
    found = batches(mesh(cp=2, tp=2, model=DOCUMENTS), **CLIPPED)
    assert_same(found, batches(Case(1, ONE_RANK.layout, DOCUMENTS), **CLIPPED))
    assert_clipped(found, MAX_NORM)


@pytest.mark.parametrize("name", ["cp2, masked documents", pytest.param("cp4", marks=slow)])
def test_trl_6843_documents_stay_apart_under_context_parallelism(name: str, batches: Batches) -> None:
    case = Case(MESHES[name].num_ranks, MESHES[name].layout, DOCUMENTS)
    masked = batches(Case(1, ONE_RANK.layout, DOCUMENTS), **CLIPPED)
    assert_same(batches(case, **CLIPPED), masked)


@slow
@pytest.mark.parametrize("schedule", [name for name, needs in SCHEDULES.items() if needs.splits_backward])
def test_pytorch_144530_split_backward_passes_are_reduced_over_replicas(schedule: str, batches: Batches) -> None:
    case = mesh(pp=2, replicate=2, schedule=schedule, model={"model__n_layers": 4})
    assert_same(batches(case, **CLIPPED), batches(Case(1, ONE_RANK.layout, case.model), **CLIPPED))


# ---- the norm of the gradients ---------------------------------------------------------------------------------------

NORMS = ["tp2", *(pytest.param(name, marks=slow) for name in ("fsdp4", "pp2 x fsdp2", "pp2 x tp2", "cp2 x tp2"))]


@pytest.mark.parametrize("name", NORMS)
def test_torchtitan_4312_norm_of_the_whole_gradients(name: str, batches: Batches) -> None:
    case = MESHES[name]
    assert_clipped(batches(case, **CLIPPED), MAX_NORM)
    assert batches(case, **CLIPPED).norm == pytest.approx(batches(ONE_RANK, **CLIPPED).norm, rel=1e-5)


def test_nemo_rl_3788_replicated_gradients_count_once(batches: Batches) -> None:
    found = batches(MESHES["tp2"], **CLIPPED)
    replicated = [gradient for name, gradient in found.gradients.items() if "norm" in name]
    share = sum(float(gradient.double().square().sum()) for gradient in replicated) / found.norm_of_gradients**2
    assert share > 1e-4, "counting them twice would not be noticed"
    assert found.norm == pytest.approx(found.norm_of_gradients, rel=1e-6)


@slow
@pytest.mark.parametrize("name", ["ddp2", "hsdp 2x2", "fsdp2"])
def test_torchtitan_2318_norm_with_replicas(name: str, batches: Batches) -> None:
    found, expected = batches(MESHES[name], **CLIPPED), batches(ONE_RANK, **CLIPPED)
    assert_same(found, expected)
    assert found.norm == pytest.approx(expected.norm, rel=1e-5)


def test_torchtitan_4135_norm_of_bfloat16_gradients_however_they_are_split() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(37 + size, generator=generator).bfloat16() for size in range(40)]
    exact = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    cpu = torch.device("cpu")
    assert global_norm(gradients, cpu).item() == pytest.approx(exact, rel=1e-6)
    assert global_norm(gradients[::-1], cpu).item() == global_norm(gradients, cpu).item()
    assert global_norm([torch.cat(gradients)], cpu).item() == pytest.approx(exact, rel=1e-6)
    assert abs(float(torch.stack([g.norm() for g in gradients]).norm()) - exact) > 1e-6 * exact, (
        "bfloat16 is exact here"
    )


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", pytest.param("InterleavedZeroBubble", marks=slow)])
def test_olmo_core_679_parts_of_one_rank_start_differently(schedule: str, batches: Batches) -> None:
    case = mesh(pp=2, schedule=schedule, model={**DOCUMENTS, "model__n_layers": 4})
    found = batches(case, **CLIPPED).weights
    expected = batches(Case(1, ONE_RANK.layout, case.model), **CLIPPED).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    layers = [found[f"layers.{layer}.attention.wq.weight"] for layer in range(4)]
    assert not any(torch.equal(one, other) for number, one in enumerate(layers) for other in layers[:number])
