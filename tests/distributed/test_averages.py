"""The moving average of the weights: a hand loop's on every mesh, beside the weights, through resumes and growths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.meshes import GLOBAL_BATCH, MESHES, TIED, mesh, slow_ones
from tests.distributed.test_elastic import logged_by_rank_0
from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, train, trainer_of, without_timings
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.commands.export import export_folder
from titan_growth.commands.foreign import open_with_recipe
from titan_growth.commands.grow import grow_checkpoint
from titan_growth.commands.growth_args import planned_growth
from titan_growth.commands.source import whole_tensor
from titan_growth.config.loader import to_toml

DECAY = 0.6
PREFIX = "shadow.ema."
SETTINGS: dict[str, Any] = {
    "averages__ema_decay": DECAY,
    "model__n_layers": 2,
    "training__steps": 4,
    "lr_scheduler__warmup_steps": 0,
    "lr_scheduler__decay_ratio": 0.0,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "validation__enable": True,
    "validation__freq": 2,
}
ONE = mesh()
Tensors = dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def stored(step_folder: Path, prefix: str = "") -> Tensors:
    """The tensors of a step folder with a prefix, whole, without it."""
    reader = SafeReader(step_folder)
    entries, chunks = reader.tensor_entries(), reader.chunks()
    return {
        name.removeprefix(prefix): whole_tensor(reader, chunks[name], tuple(entries[name].size))
        for name in chunks
        if name.startswith(prefix)
    }


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def losses(folder: Path) -> list[dict[str, float]]:
    """The validation lines of a run."""
    return [line for line in read_metrics(folder) if "validation_loss" in line]


def without_ema(folder: Path) -> list[dict[str, Any]]:
    """What a run without an average would have written."""
    return [
        {key: value for key, value in line.items() if key != "ema_validation_loss"}
        for line in without_timings(read_metrics(folder))
    ]


# ---- what it is ------------------------------------------------------------------------------------------------------


def by_hand(rank: int, num_ranks: int, recipe: Any, decay: float) -> list[str]:
    """Trains, and compares the average after each step with that of whole weights, gathered by hand. The names that
    this rank has compared."""
    names: set[str] = set()
    with trainer_of(recipe, num_ranks) as trainer:
        mean: Tensors = {}
        weighted: dict[str, list[Tensor]] = {}
        after = trainer.state.advance

        def advance(*args: Any) -> None:
            after(*args)
            tensors = {name: whole(one) for name, one in trainer.runtime.tensors(optimizer=False).items()}
            step = trainer.progress.step
            for name in (one for one in tensors if not one.startswith(PREFIX)):
                weight = tensors[name].float()
                weighted.setdefault(name, []).append(weight.double())
                share = (1 - decay) / (1 - decay**step)
                mean[name] = torch.lerp(mean.get(name, torch.zeros_like(weight)), weight, share)
                found = tensors[f"{PREFIX}{name}"]
                assert found.dtype == torch.float32
                assert torch.equal(found, mean[name]), f"step {step}: {name}"
                counts = [decay ** (step - 1 - before) for before in range(step)]
                exact = sum(count * one for count, one in zip(counts, weighted[name], strict=True)) / sum(counts)
                assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-7), f"step {step}: {name}"
                names.add(name)

        trainer.state.advance = advance
        assert trainer.fit()
    return sorted(names)


@pytest.mark.parametrize(
    "name",
    [
        "one rank",
        "fsdp2",
        "tp2",
        "pp2, tied head",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "ddp2",
                "pp2",
                "cp2",
                "fsdp2 x tp2",
                "hsdp 2x2",
                "pp2 x fsdp2",
                "fsdp4, uneven shards",
                "fsdp2, tied head",
                "pp2 x fsdp2 x tp2",
            )
        ),
    ],
)
def test_it_is_the_weighted_mean_of_all_steps(name: str, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Bit for bit the same recurrence over gathered weights, and to 1e-5 the sum that it stands for."""
    case = ONE if name == "one rank" else MESHES[name]
    recipe = make_recipe(tmp_path / "run", **{**SETTINGS, **case.model, **case.layout})
    names = warm_ranks(by_hand, case.num_ranks, case.num_ranks, recipe, DECAY)
    assert {"tok_embeddings.weight", "layers.1.attention.wq.weight", "output.weight"} <= set().union(*names)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_it_is_float32_beside_weights_of_bfloat16(dtype: str, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    settings = {**SETTINGS, **mesh(shard=2).layout, "training__dtype": dtype}
    settings["training__mixed_precision_param"] = dtype
    warm_ranks(by_hand, 2, 2, make_recipe(tmp_path / "run", **settings), DECAY)
    assert without_ema(tmp_path / "run") == plain(tmp_path, warm_ranks, 2, settings)


# ---- beside the weights ----------------------------------------------------------------------------------------------


def plain(folder: Path, warm_ranks: WarmRanks, num_ranks: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the same run without an average."""
    warm_ranks(train, num_ranks, num_ranks, make_recipe(folder / "plain", **settings | {"averages__ema_decay": 0.0}))
    assert not any("ema_validation_loss" in line for line in read_metrics(folder / "plain"))
    return without_timings(read_metrics(folder / "plain"))


def validated_with(rank: int, num_ranks: int, recipe: Any) -> float:
    """The validation loss of a run's initial weights."""
    with trainer_of(recipe, num_ranks) as trainer:
        return trainer.runtime.validator.run(trainer.runtime.engine)[""]


@pytest.mark.parametrize("name", slow_ones(["fsdp2", "tp2", "pp2", "fsdp2 x tp2"], "tp2", "fsdp2 x tp2"))
def test_its_loss_is_that_of_one_rank(name: str, trained: Any) -> None:
    """And falls behind the weights' loss, which falls fast."""
    case = MESHES[name]
    found = trained(case.num_ranks, **{**SETTINGS, **case.layout})
    expected = trained(1, **SETTINGS, training__local_batch_size=GLOBAL_BATCH)
    for line, reference in zip(found, expected, strict=True):
        if "validation_loss" in line:
            assert line["ema_validation_loss"] == pytest.approx(reference["ema_validation_loss"], rel=1e-5)
            assert line["ema_validation_loss"] > line["validation_loss"]


def test_its_loss_is_that_of_its_weights(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """A run that starts from the exported average has its loss, and so has one on another mesh."""
    case = mesh(shard=2)
    recipe = make_recipe(tmp_path / "run", **{**SETTINGS, **case.layout})
    warm_ranks(train, 2, 2, recipe)
    line = export_folder(tmp_path / "run/checkpoint/step-4", tmp_path / "exported", shadow="ema")
    assert "of step 4, the ema, as LlamaForCausalLM" in line
    start = {"checkpoint__initial_load_path": str(tmp_path / "exported"), "averages__ema_decay": 0.0}
    again = warm_ranks(validated_with, 2, 2, make_recipe(tmp_path / "again", **SETTINGS | case.layout | start))
    assert again[0] == losses(tmp_path / "run")[-1]["ema_validation_loss"]
    own = export_folder(tmp_path / "run/checkpoint/step-4", tmp_path / "own")
    assert "the ema" not in own
    assert (tmp_path / "own/model.safetensors").read_bytes() != (tmp_path / "exported/model.safetensors").read_bytes()


FLOAT8 = {
    "model__dim": 64,
    "model__vocab_size": 288,
    "model__converters": ["quantize.linear.float8"],
    "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
    "quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp": True,
}
UNDISTURBED: dict[str, tuple[Any, dict[str, Any]]] = {
    "one rank, bf16": (ONE, {"training__mixed_precision_param": "bfloat16"}),
    "fsdp2, never reshard": (MESHES["fsdp2, never reshard"], {}),
    "pp2, tied head": (MESHES["pp2, tied head"], TIED),
    "fsdp2, Float8": (mesh(shard=2), FLOAT8),
}


@pytest.mark.usefixtures("warm_imports")
@pytest.mark.parametrize("name", slow_ones(UNDISTURBED, "pp2, tied head", "fsdp2, Float8"))
def test_training_does_not_notice_it(name: str, tmp_path: Path) -> None:
    """The weights are put back after a validation: the metrics are those of a run without an average."""
    case, more = UNDISTURBED[name]
    settings = {**SETTINGS, **case.layout, **more, "validation__freq": 1}
    run_ranks(train, case.num_ranks, case.num_ranks, make_recipe(tmp_path / "run", **settings))
    assert without_ema(tmp_path / "run") == plain(tmp_path, run_ranks, case.num_ranks, settings)
    lines = losses(tmp_path / "run")
    assert lines[0]["ema_validation_loss"] == lines[0]["validation_loss"], "after one step the mean is the weights"
    assert all(line["ema_validation_loss"] > line["validation_loss"] for line in lines[1:])
    assert all(math.isfinite(line["ema_validation_loss"]) for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_imports")
def test_float8_has_the_scales_of_the_average(tmp_path: Path) -> None:
    """Those computed ahead are computed again: the losses are those of a run that computes them when it needs them."""
    settings = {**SETTINGS, **mesh(shard=2).layout, **FLOAT8}
    for name, ahead in (("ahead", True), ("late", False)):
        key = "quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp"
        run_ranks(train, 2, 2, make_recipe(tmp_path / name, **settings | {key: ahead}))
    assert without_timings(losses(tmp_path / "ahead")) == without_timings(losses(tmp_path / "late"))


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_average(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Metrics and stored tensors, bit for bit."""
    settings = {**SETTINGS, **mesh(shard=2).layout, "lr_scheduler__total_steps": 6}
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "whole", **settings | {"training__steps": 6}))
    for steps in (2, 6):
        warm_ranks(train, 2, 2, make_recipe(tmp_path / "parts", **settings | {"training__steps": steps}))
    whole, parts = ([line for line in losses(tmp_path / name)] for name in ("whole", "parts"))
    assert [line["ema_validation_loss"] for line in parts] == [line["ema_validation_loss"] for line in whole]
    assert_same(*(stored(tmp_path / name / "checkpoint/step-6", PREFIX) for name in ("parts", "whole")))


def read(rank: int, num_ranks: int, recipe: Any) -> Tensors:
    """The whole shadow weights of a run that has just resumed."""
    with trainer_of(recipe, num_ranks) as trainer:
        return {
            name.removeprefix(PREFIX): whole(one)
            for name, one in trainer.runtime.tensors(optimizer=False).items()
            if name.startswith(PREFIX)
        }


@pytest.mark.parametrize("name", slow_ones(["fsdp2 -> tp2", "pp2, tied head -> fsdp2, tied head"], "fsdp2 -> tp2"))
def test_it_is_resharded(name: str, tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Exactly; and the run then has one rank's losses."""
    source, target = name.split(" -> ")
    settings = {**SETTINGS, **MESHES[source].model, "training__steps": 6, "lr_scheduler__total_steps": 6}
    first = settings | {"training__steps": 2, **MESHES[source].layout}
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "moved", **first))
    then = make_recipe(tmp_path / "moved", **settings, **MESHES[target].layout)
    found = warm_ranks(read, 2, 2, then)
    assert_same(found[0], stored(tmp_path / "moved/checkpoint/step-2", PREFIX))
    warm_ranks(train, 2, 2, then)
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "one", **settings, training__local_batch_size=GLOBAL_BATCH))
    for line, reference in zip(losses(tmp_path / "moved"), losses(tmp_path / "one"), strict=True):
        assert line["ema_validation_loss"] == pytest.approx(reference["ema_validation_loss"], rel=1e-5)


@pytest.mark.slow
def test_it_can_be_turned_on_and_off(tmp_path: Path) -> None:
    """On: it starts from the weights. Off: it is dropped. Both are said."""
    settings = {**SETTINGS, **mesh(shard=2).layout, "lr_scheduler__total_steps": 6}
    off = {"averages__ema_decay": 0.0}
    run_ranks(train, 2, 2, make_recipe(tmp_path / "run", **settings | off | {"training__steps": 2}))
    then = make_recipe(tmp_path / "run", **settings)
    started = run_ranks(read, 2, 2, then)[0]
    weights = stored(tmp_path / "run/checkpoint/step-2")
    assert_same(started, {name: weights[name] for name in started})
    logged = run_ranks(logged_by_rank_0, 2, 2, then)[0]
    assert "ema starts from the weights: step-2 has none" in logged
    assert "changed since step-2: averages.ema_decay = 0.6 (was 0.0)" in logged
    assert stored(tmp_path / "run/checkpoint/step-4", PREFIX)
    logged = run_ranks(
        logged_by_rank_0, 2, 2, make_recipe(tmp_path / "run", **settings | off | {"training__steps": 6})
    )[0]
    assert "ema of step-4 is dropped: the recipe keeps none" in logged
    assert not stored(tmp_path / "run/checkpoint/step-6", PREFIX)


def test_another_run_takes_it_with_all_state_only(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """As the run of a branch does. With weights only it starts from those."""
    settings = {**SETTINGS, **mesh(shard=2).layout, **TIED, "lr_scheduler__total_steps": 4}
    warm_ranks(train, 2, 2, make_recipe(tmp_path / "run", **settings | {"training__steps": 2}))
    small = tmp_path / "run/checkpoint/step-2"
    start = {"checkpoint__initial_load_path": str(small)}
    all_state = start | {"checkpoint__initial_load_model_only": False}
    assert_same(warm_ranks(read, 2, 2, make_recipe(tmp_path / "all", **settings | all_state))[0], stored(small, PREFIX))
    found = warm_ranks(read, 2, 2, make_recipe(tmp_path / "weights", **settings | start))[0]
    weights = stored(small)
    assert_same(found, {name: weights[name] for name in found})


def test_the_last_weights_only_save_has_it(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """It is weights, and what one wants of the last step."""
    warm_ranks(train, 1, 1, make_recipe(tmp_path / "run", **SETTINGS, checkpoint__last_save_model_only=True))
    assert stored(tmp_path / "run/checkpoint/step-4", PREFIX)
    assert not stored(tmp_path / "run/checkpoint/step-4", "optimizer.")


# ---- growth ----------------------------------------------------------------------------------------------------------


def just_grown(rank: int, num_ranks: int, recipe: Any) -> Tensors:
    """Trains through the growth; the whole shadow weights right after it."""
    found: Tensors = {}
    with trainer_of(recipe, num_ranks) as trainer:
        original = trainer.grow

        def grow_and_look() -> bool:
            assert original()
            for name, tensor in trainer.runtime.tensors(optimizer=False).items():
                if name.startswith(PREFIX):
                    found[name.removeprefix(PREFIX)] = whole(tensor)
            return True

        trainer.grow = grow_and_look
        assert trainer.fit()
    return found


OPERATORS: dict[str, dict[str, Any]] = {
    "stack": {"operator": "stack", "factor": 2},
    "stack with noise": {"operator": "stack", "factor": 2, "noise": 0.01},
    "zero_depth": {"operator": "zero_depth", "factor": 2},
    "split_width": {"operator": "split_width", "factor": 2, "noise": 0.01},
    "zero_width": {"operator": "zero_width", "factor": 2},
}
SIZES = {"depth": {"model__n_layers": 4}, "width": {"model__dim": 64, "model__n_heads": 8, "model__n_kv_heads": 4}}


def growing(operator: str, **more: Any) -> dict[str, Any]:
    """Settings of a run that grows after step 2."""
    values = {"at": "2 steps", **OPERATORS[operator], **more}
    table = ", ".join(f"{key} = {f'{value!r}'.replace(chr(39), chr(34))}" for key, value in values.items())
    sizes = SIZES["width" if "width" in operator else "depth"]
    return {**SETTINGS, **sizes, "growth__stages": f"[{{{table}}}]"}


@pytest.mark.parametrize("operator", slow_ones(OPERATORS, "stack", "zero_depth", "split_width"))
def test_the_average_of_a_grown_model_is_the_average_grown(
    operator: str, tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """Bit for bit what the operator makes on disk of a model whose weights are the average; on two ranks, with moments
    reset, as is the default."""
    recipe = make_recipe(tmp_path / "run", **growing(operator), **mesh(shard=2).layout)
    grown = warm_ranks(just_grown, 2, 2, recipe)[0]
    small = tmp_path / "run/checkpoint/step-2"
    export_folder(small, tmp_path / "average", shadow="ema")
    planned = planned_growth(OPERATORS[operator])
    seed = recipe.debug.seed + 1_000_003  # of a run's first growth
    grow_checkpoint(open_with_recipe(tmp_path / "average", None), tmp_path / "large", planned, seed=seed)
    assert_same(grown, stored(tmp_path / "large"))
    weights = stored(small)
    assert any(not torch.equal(stored(small, PREFIX)[name], weights[name]) for name in weights if "wq" in name)
    # On disk the average grows beside the weights.
    grow_checkpoint(open_with_recipe(small, None), tmp_path / "both", planned, seed=seed)
    assert_same(stored(tmp_path / "both", PREFIX), grown)


@pytest.mark.slow
def test_it_grows_onto_another_mesh(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """From fsdp2 to tp2: the average of one rank to 1e-6, and its losses after the growth to 1e-5."""
    table = ", parallelism = {data_parallel_shard_degree = 1, tensor_parallel_degree = 2}, local_batch_size = 4}]"
    one = growing("stack") | {"training__local_batch_size": 4}
    moved = one | {
        "growth__stages": one["growth__stages"].replace("}]", table),
        "parallelism__data_parallel_shard_degree": 2,
    }
    found = warm_ranks(just_grown, 2, 2, make_recipe(tmp_path / "moved", **moved))[0]
    expected = warm_ranks(just_grown, 1, 1, make_recipe(tmp_path / "one", **one))[0]
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    for line, reference in zip(losses(tmp_path / "moved"), losses(tmp_path / "one"), strict=True):
        assert line["ema_validation_loss"] == pytest.approx(reference["ema_validation_loss"], rel=1e-5)


def test_after_a_learned_growth_it_starts_over(tmp_path: Path) -> None:
    """Its maps are learned for the weights, batch by batch; the average starts from the result."""
    settings = growing("stack")
    settings["growth__stages"] = '[{at = "2 steps", operator = "learn", factor = 2, options = {steps = 2}}]'
    recipe = make_recipe(tmp_path / "run", **settings, **mesh(shard=2).layout)
    logged = run_ranks(logged_by_rank_0, 2, 2, recipe)[0]
    assert "ema starts from the weights: the growth was learned" in logged


@pytest.mark.slow
def test_a_growth_from_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    """Turned on while the growth was due: it starts from the grown weights."""
    settings = growing("stack") | mesh(shard=2).layout
    run_ranks(train, 2, 2, make_recipe(tmp_path / "run", **settings | {"averages__ema_decay": 0.0}))
    recipe = make_recipe(tmp_path / "run", **settings | {"checkpoint__load_step": 2})
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(recipe))
    logged = run_ranks(logged_by_rank_0, 2, 2, recipe)[0]
    assert "ema starts from the weights: step-2 has none" in logged
    assert any("grown 2 -> 4 layers" in line for line in logged)


# ---- another stage's -------------------------------------------------------------------------------------------------


def with_another(rank: int, num_ranks: int, recipe: Any) -> Tensors:
    """Trains through a growth with a stage that keeps the largest value of each weight; its own, whole, right after."""
    from titan_growth.stages.base import Stage
    from titan_growth.stages.order import register_stage

    @register_stage
    class Largest(Stage):
        name = "largest"

        def enabled(self, context: Any) -> bool:
            return True

        def apply(self, parts: Any, context: Any) -> Any:
            return parts

        def update_shadow(self, shadow: Any, weights: Any, context: Any) -> None:
            for kept, weight in zip(shadow, weights, strict=True):
                torch.maximum(kept, weight, out=kept)

        def describe(self, context: Any) -> str:
            return "largest: the largest value of each weight"

    return just_grown(rank, num_ranks, recipe)


def test_a_stage_of_another_may_keep_weights_too(tmp_path: Path) -> None:
    """Beside the average: saved, grown and validated without a line of its own."""
    recipe = make_recipe(tmp_path / "run", **growing("stack"), **mesh(shard=2).layout)
    run_ranks(with_another, 2, 2, recipe)
    small, large = (stored(tmp_path / f"run/checkpoint/step-{step}", "shadow.largest.") for step in (2, 4))
    weights = stored(tmp_path / "run/checkpoint/step-2")
    assert all((small[name] >= weights[name]).all() for name in small)
    assert {name.split(".")[1] for name in large if name.startswith("layers.")} == set("0123")
    assert all((large[name] >= small[name]).all() for name in small)
    assert all("largest_validation_loss" in line and "ema_validation_loss" in line for line in losses(tmp_path / "run"))
