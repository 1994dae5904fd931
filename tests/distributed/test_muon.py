"""Runs under Muon: every mesh computes what one rank does, through growths over depth and width, and on resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import GLOBAL_BATCH, MESHES
from tests.distributed.test_growth_across_meshes import MUON, UNDER_MUON, Matrix, assert_same, every_fourth
from tests.distributed.test_parity import Trained, assert_agrees_with_one_rank
from tests.faults.elastic import MESHES as ELASTIC_MESHES
from tests.faults.elastic import QUICK, TOLERANCE, Elastic
from tests.harness import WarmRanks
from tests.runs import make_recipe, trainer_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.layout.mesh import Mesh

SETTINGS = {**MUON, "training__steps": 3, "model__n_layers": 3}
SOME = ("fsdp2", "tp2", "pp2 x fsdp2", "hsdp 2x2")


def some(names: Any, quick: Any) -> list[Any]:
    """Parameters of which only a few are in the default suite."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(MESHES, SOME))
def test_meshes_agree_with_one_rank(name: str, trained: Trained) -> None:
    """Losses to 1e-5 at three steps: gathering rounds nothing, so only the last bits of gradients differ."""
    settings = {key: value for key, value in SETTINGS.items() if key not in MESHES[name].model}
    lines = assert_agrees_with_one_rank(MESHES[name], trained, **settings)
    expected = trained(1, **settings, **MESHES[name].model, training__local_batch_size=GLOBAL_BATCH)
    for line, reference in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-5)


def asks_for_group(rank: int, recipe: Recipe) -> bool:
    """Whether starting a run asks for the group of the ranks that share matrices, which is then made."""
    asked: list[Mesh] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mesh, "part_group", property(asked.append))
        with trainer_of(recipe, 2):
            return bool(asked)


@pytest.mark.parametrize(("name", "asks"), [("AdamW", False), ("Muon", True)])
def test_only_a_rule_for_whole_matrices_gets_a_group(
    name: str, asks: bool, warm_ranks: WarmRanks, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "run", optimizer__name=name, parallelism__tensor_parallel_degree=2)
    assert warm_ranks(asks_for_group, 2, recipe) == [asks] * 2


def test_it_is_another_optimizer(trained: Trained) -> None:
    """Beside AdamW: the same first loss, and others from then on."""
    layout = {"training__local_batch_size": GLOBAL_BATCH}
    muon = trained(1, **SETTINGS, **layout)
    adamw = trained(1, **SETTINGS | {"optimizer__name": "AdamW"}, **layout)
    assert muon[0]["loss"] == adamw[0]["loss"]
    assert muon[2]["loss"] != pytest.approx(adamw[2]["loss"], rel=1e-4)


# ---- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "operator"),
    [
        ("tp2", "fsdp2", "random_width asymmetric, Muon"),
        *every_fourth(UNDER_MUON),
    ],
)
def test_growths_are_those_of_one_rank(source: str, target: str, operator: str, matrix: Matrix) -> None:
    """Weights, momentum and AdamW's moments bit for bit, three more steps to 1e-5."""
    assert_same(matrix, source, target, operator)


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elastic(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Elastic:
    return Elastic(tmp_path_factory.mktemp("elastic"), warm_ranks, **MUON)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [*QUICK, *zip(ELASTIC_MESHES, reversed(ELASTIC_MESHES), strict=True)])
def test_a_run_resumes_on_another_mesh(source: str, target: str, elastic: Elastic) -> None:
    resumed = elastic.resumed(source, target)
    assert resumed.one_sequence
    assert resumed.difference <= TOLERANCE
