"""Degrees and batch sizes that fit the ranks, and the order in which stages are composed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from titan_growth.config import plugins
from titan_growth.config.loader import load_recipe
from titan_growth.config.plugins import recipe_class, register_table
from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.config.section import Section
from titan_growth.layout.mesh import Mesh
from titan_growth.layout.mesh_shape import AXES, MeshShape, resolve_batch, resolve_mesh
from titan_growth.stages import order
from titan_growth.stages.base import Stage
from titan_growth.stages.order import register_stage, registered_stages, resolve_order, stages_of
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.findings import Findings

GOLDEN = Path(__file__).parents[2] / "golden" / "order.txt"


def resolved(num_ranks: int, replicate: int, shard: int):
    section = ParallelismConfig(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
    found = Findings()
    return resolve_mesh(section, num_ranks, found), found.problems


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
    assert resolve_batch(asked, local, shape, found := Findings()) == (batch, accumulation)
    assert not found.problems


@pytest.mark.parametrize(("asked", "local", "degree"), [(12, 8, 1), (8, 8, 2), (24, 8, 2)])
def test_batches_that_do_not_fit(asked: int, local: int, degree: int) -> None:
    assert resolve_batch(asked, local, MeshShape(dp_shard=degree), found := Findings()) is None
    assert [problem.key for problem in found.problems] == ["training.global_batch_size"]
    assert f"{asked} is not a multiple of" in found.problems[0].message
    assert found.problems[0].message.endswith(f"degree {degree} = {local * degree}")


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
        ({"a": stage(), "b": stage("a"), "c": stage("b"), "d": stage("a")}, ["a", "b", "c", "d"]),
        ({"d": stage("b", "c"), "c": stage("a"), "b": stage("a"), "a": stage()}, ["a", "c", "b", "d"]),
        ({}, []),
    ],
)
def test_order_follows_after_and_then_registration(stages: dict[str, type], expected: list[str]) -> None:
    assert resolve_order(stages) == expected


def test_a_circle_is_named() -> None:
    with pytest.raises(ConfigError, match="plugins: the stages cannot be ordered: ") as caught:
        resolve_order({"a": stage("b"), "b": stage("c"), "c": stage("a"), "d": stage()})
    named = caught.value.problems[0].message.split(": ")[1].split(" must come after ")
    assert set(named) == {"a", "b", "c"}
    assert all(before == {"a": "b", "b": "c", "c": "a"}[name] for name, before in pairwise(named))
    with pytest.raises(ConfigError, match="cannot be ordered: a must come after a"):
        resolve_order({"a": stage("a")})


def test_a_name_that_no_stage_has() -> None:
    """Ignored, it would silently put the stage somewhere else."""
    with pytest.raises(ConfigError) as caught:
        resolve_order({"mine": stage("fdsp", "fsdp"), "yours": stage("nowhere"), "fsdp": stage()})
    assert [str(problem) for problem in caught.value.problems] == [
        "plugins: the stage 'mine' must come after 'fdsp', which is not a stage. Did you mean 'fsdp'?",
        "plugins: the stage 'yours' must come after 'nowhere', which is not a stage. The stages are mine, yours, fsdp",
    ]


@pytest.mark.parametrize(
    ("after", "expected_before"),
    [
        ((), "pipeline"),
        (("pipeline",), "float8"),
        (("compile",), "autocast"),
        (("autocast",), "sdc_check"),
        (("sdc_check",), "fsdp"),
        (("pipeline", "chunked_loss"), "growth_mask"),
        (("growth_mask",), "activation_checkpoint"),
    ],
)
def test_a_stage_of_a_plugin_comes_as_early_as_it_may(after: tuple[str, ...], expected_before: str) -> None:
    """So before fsdp unless it asks otherwise, however long its chain of other plugins' stages."""
    own = registered_stages()
    for stages in ({"x": stage(*after), **own}, {**own, "x": stage(*after)}):
        order = resolve_order(stages)
        assert order[order.index("x") + 1] == expected_before
        assert order[-2:] == ["fsdp", "ema"]
    order = resolve_order({**own, "z": stage("y"), "y": stage("x"), "x": stage(*after)})
    assert order[(position := order.index("x")) : position + 4] == ["x", "y", "z", expected_before]
    assert resolve_order({**own, "x": stage("fsdp")})[-3:] == ["fsdp", "x", "ema"]


def test_the_order_of_the_stages_is_the_golden_one() -> None:
    """A change of composition is a decision: change tests/golden/order.txt with it."""
    assert resolve_order(registered_stages()) == GOLDEN.read_text().split()
    assert [found.name for found in stages_of(load_recipe([]))] == GOLDEN.read_text().split()


def test_every_stage_keeps_the_protocol() -> None:
    for name, kind in registered_stages().items():
        assert kind.name == name
        found = kind.from_recipe(load_recipe([]))
        assert isinstance(found, Stage)


def test_a_built_in_stage_is_named_like_its_module() -> None:
    """So a plugin's name clash is found without importing the built-in stages."""
    for name, kind in registered_stages().items():
        assert kind.__module__ == f"titan_growth.stages.{name}"


@pytest.fixture
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private copies of the registries."""
    monkeypatch.setattr(order, "_REGISTRY", dict(registered_stages()))
    monkeypatch.setattr(plugins, "_TABLES", {})


class Table(Section):
    """A table."""

    size: int = 1


def new_stage(qualname: str = "Mine", without: tuple[str, ...] = (), **attributes: Any) -> type:
    """A complete plugin stage class, except for what is left out or changed."""
    methods = {name: lambda *_: True for name in ("from_recipe", "enabled", "apply", "describe")}
    body = {"name": "mine", "__module__": "my_plugin", "__qualname__": qualname, **methods, **attributes}
    return type("Mine", (Stage,), {key: value for key, value in body.items() if key not in without})


@pytest.mark.usefixtures("_registries")
def test_a_module_that_is_imported_again_replaces_its_stage_and_table() -> None:
    """As after a failed import, or `importlib.reload`."""
    for _ in range(2):
        section = type("Table", (Table,), {})
        kind = new_stage(table="my_table", settings=section)
        assert register_stage(kind) is kind
        assert registered_stages()["mine"] is kind
        assert recipe_class().model_fields["my_table"].annotation is section
    assert list(registered_stages()).count("mine") == 1


REFUSED = [
    (new_stage("Other"), "my_plugin.Other: my_plugin.Mine is called 'mine' already. Give one of the two another name"),
    (new_stage(__module__="their_plugin"), "their_plugin.Mine: my_plugin.Mine is called 'mine' already. Give one"),
    (new_stage(name="fsdp"), "my_plugin.Mine: 'fsdp' is the name of a stage of titan_growth itself. Give it another"),
    (new_stage(name="my-stage"), "my_plugin.Mine: needs a name of lower-case letters, digits and _, has 'my-stage'"),
    (new_stage(without=("name",)), "my_plugin.Mine: needs a name of lower-case letters, digits and _, has None. Write"),
    (
        new_stage(after="fsdp"),
        "my_plugin.Mine: `after` must be a tuple of names, is 'fsdp'. Write after = (\"pipeline\",)",
    ),
    (new_stage(after=(1,)), "my_plugin.Mine: `after` must be a tuple of names, is (1,)"),
    (new_stage(without=("apply", "describe")), "my_plugin.Mine: lacks apply, describe. Derive it from Stage"),
    (new_stage(check=3), "my_plugin.Mine: lacks check. Derive it"),
    (
        type("Mine", (), {"name": "mine", "__module__": "my_plugin"}),
        "my_plugin.Mine: lacks from_recipe, enabled, check",
    ),
    (
        type("Mine", (), {**vars(Stage), **vars(new_stage()), "__module__": "my_plugin"}),
        "my_plugin.Mine: is not derived from titan_growth.stages.base.Stage. Write class Mine(Stage)",
    ),
    (3, "register_stage: takes a class, got 3. Write @register_stage above a class"),
    (new_stage(settings=Table), "my_plugin.Mine: has `settings` but no `table`. Give both"),
    (new_stage(table="my_table"), "my_plugin.Mine: has `table` but no `settings`. Give both"),
    (new_stage(table="training", settings=Table), "training: is a key of the recipe itself"),
    (
        new_stage("Mine", name="another", table="taken", settings=Table),
        "taken: is the table of my_plugin.Theirs already",
    ),
]


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize(("kind", "message"), REFUSED, ids=[message.partition(": ")[2][:40] for _, message in REFUSED])
def test_a_class_that_cannot_be_a_stage(kind: type, message: str) -> None:
    """One message that names the class, and nothing is registered."""
    register_stage(new_stage())
    register_table("taken", type("Theirs", (Table,), {"__module__": "my_plugin", "__qualname__": "Theirs"}))
    before = registered_stages()
    with pytest.raises(ConfigError) as caught:
        register_stage(kind)
    assert str(caught.value).startswith(message)
    assert len(caught.value.problems) == 1
    assert registered_stages() == before
    assert list(plugins._TABLES) == ["taken"]


@pytest.mark.usefixtures("_registries")
def test_all_flaws_of_a_class_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        register_stage(new_stage(name="fsdp", after="x", without=("apply",), table="t"))
    assert len(caught.value.problems) == 4
