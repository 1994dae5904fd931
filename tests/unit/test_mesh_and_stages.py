"""Degrees and batch sizes that fit the ranks, and the order in which stages are composed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from titan_growth.config.loader import load_recipe
from titan_growth.config.schema import Parallelism
from titan_growth.mesh import AXES, Mesh, MeshShape, resolve_batch, resolve_mesh
from titan_growth.stages import base
from titan_growth.stages.base import StageDefaults, register_stage, registered_stages, resolve_order, stages_of
from titan_growth.tools.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "order.txt"


def resolved(num_ranks: int, replicate: int, shard: int):
    section = Parallelism(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
    return resolve_mesh(section, num_ranks)


@pytest.mark.parametrize(
    ("num_ranks", "replicate", "shard", "expected"),
    [(1, 1, -1, (1, 1)), (8, 1, -1, (1, 8)), (8, 2, -1, (2, 4)), (8, 8, -1, (8, 1)), (8, 2, 4, (2, 4)),
     (6, 3, 2, (3, 2)), (4, 4, 1, (4, 1)), (1, 1, 1, (1, 1))],
)  # fmt: skip
def test_degrees_that_fit(num_ranks: int, replicate: int, shard: int, expected: tuple[int, int]) -> None:
    shape, problems = resolved(num_ranks, replicate, shard)
    assert not problems
    assert shape == MeshShape(dp_replicate=expected[0], dp_shard=expected[1])
    assert shape.num_ranks == num_ranks


@pytest.mark.parametrize(
    ("num_ranks", "replicate", "shard", "key", "message"),
    [
        (4, 1, 0, "data_parallel_shard_degree", "must be -1 (all ranks that are left) or at least 1, got 0"),
        (4, 3, -1, "data_parallel_replicate_degree", "3 does not divide the 4 ranks"),
        (4, 8, -1, "data_parallel_replicate_degree", "8 does not divide the 4 ranks"),
        (4, 1, 2, "data_parallel_shard_degree", "dp_replicate 1 x dp_shard 2 = 2, but there are 4 ranks"),
        (4, 2, 4, "data_parallel_shard_degree", "dp_replicate 2 x dp_shard 4 = 8, but there are 4 ranks"),
    ],
)
def test_degrees_that_do_not_fit(num_ranks: int, replicate: int, shard: int, key: str, message: str) -> None:
    shape, problems = resolved(num_ranks, replicate, shard)
    assert shape is None
    assert [(problem.key, problem.message) for problem in problems] == [(f"parallelism.{key}", message)]


@pytest.mark.parametrize(
    ("asked", "local", "shape", "batch", "accumulation"),
    [(-1, 8, MeshShape(), 8, 1), (-1, 8, MeshShape(dp_shard=4), 32, 1), (32, 8, MeshShape(dp_shard=4), 32, 1),
     (64, 8, MeshShape(dp_shard=2), 64, 4), (64, 8, MeshShape(dp_replicate=2, dp_shard=2), 64, 2),
     (6, 2, MeshShape(pp=2, tp=2, cp=2), 6, 3)],
)  # fmt: skip
def test_batches_that_fit(asked: int, local: int, shape: MeshShape, batch: int, accumulation: int) -> None:
    assert resolve_batch(asked, local, shape) == (batch, accumulation, [])


@pytest.mark.parametrize(("asked", "local", "degree"), [(12, 8, 1), (8, 8, 2), (24, 8, 2)])
def test_batches_that_do_not_fit(asked: int, local: int, degree: int) -> None:
    batch, accumulation, problems = resolve_batch(asked, local, MeshShape(dp_shard=degree))
    assert (batch, accumulation) == (asked, 1)
    assert [problem.key for problem in problems] == ["training.global_batch_size"]
    assert f"{asked} is not a multiple of" in problems[0].message
    assert problems[0].message.endswith(f"degree {degree} = {local * degree}")


def test_shape_of_a_mesh() -> None:
    shape = MeshShape(pp=2, dp_replicate=3, dp_shard=5, cp=7, tp=11)
    assert AXES == ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    assert shape.degrees == (2, 3, 5, 7, 11)
    assert (shape.dp_degree, shape.num_ranks) == (15, 2310)
    assert str(shape) == "pp 2 x dp_replicate 3 x dp_shard 5 x cp 7 x tp 11"
    assert str(MeshShape(tp=2)) == "tp 2"
    assert str(MeshShape()) == "1 rank"


def _meshes(rank: int) -> list[int]:
    places = []
    for shape in (MeshShape(dp_shard=4), MeshShape(dp_replicate=2, dp_shard=2), MeshShape(tp=2, dp_shard=2)):
        mesh = Mesh.get(shape, "cpu")
        assert Mesh.get(MeshShape(*shape.degrees), "cpu") is mesh, "a second mesh of one shape would break DTensor"
        assert mesh.device_mesh is Mesh.get(shape, "cpu").device_mesh
        assert mesh.device_mesh.mesh_dim_names == AXES
        places.append(mesh.dp_rank)
    with pytest.raises(ConfigError, match="mesh dp_shard 2 needs 2 ranks, but there are 4"):
        Mesh.get(MeshShape(dp_shard=2), "cpu")
    return places


def test_one_mesh_per_shape_and_the_rank_among_different_data() -> None:
    assert run_ranks(_meshes, 4) == [[0, 0, 0], [1, 1, 0], [2, 2, 1], [3, 3, 1]]


# ---- stages ----------------------------------------------------------------------------------------------------------


def stage(*after: str) -> type:
    return type("Some", (), {"after": after})


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"a": stage(), "b": stage(), "c": stage()}, ["a", "b", "c"]),
        ({"c": stage(), "b": stage(), "a": stage()}, ["c", "b", "a"]),
        ({"a": stage("c"), "b": stage(), "c": stage()}, ["b", "c", "a"]),
        ({"a": stage("b"), "b": stage("c"), "c": stage()}, ["c", "b", "a"]),
        ({"a": stage("not there"), "b": stage()}, ["a", "b"]),
        ({"d": stage("b", "c"), "c": stage("a"), "b": stage("a"), "a": stage()}, ["a", "c", "b", "d"]),
        ({}, []),
    ],
)
def test_order_follows_after_and_then_registration(stages: dict[str, type], expected: list[str]) -> None:
    assert resolve_order(stages) == expected


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match="stages cannot be ordered: ") as caught:
        resolve_order({"a": stage("b"), "b": stage("c"), "c": stage("a"), "d": stage()})
    named = str(caught.value).split(": ")[1].split(" -> ")
    assert set(named) == {"a", "b", "c"}
    assert named[0] == named[-1]


def test_the_order_of_the_stages_is_the_golden_one() -> None:
    """A change of composition is a decision: change tests/golden/order.txt with it."""
    assert resolve_order(registered_stages()) == GOLDEN.read_text().split()
    assert [found.name for found in stages_of(load_recipe([]))] == GOLDEN.read_text().split()


def test_every_stage_keeps_the_protocol() -> None:
    for name, kind in registered_stages().items():
        assert kind.name == name
        found = kind.from_recipe(load_recipe([]))
        assert isinstance(found, base.Stage)


def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registered_stages()
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    class Mine(StageDefaults):
        name = "mine"

    assert register_stage(Mine) is Mine
    assert "mine" in registered_stages()
    with pytest.raises(AssertionError, match="two stages are called 'mine'"):
        register_stage(Mine)
