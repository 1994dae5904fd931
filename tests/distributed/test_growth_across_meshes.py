"""The resharding matrix: from any mesh to any mesh, the grown model is what one rank makes of the same checkpoint.

A run on the source mesh stops at its growth and is restarted on the target mesh, where it grows. Every weight and both
moments must be, bit for bit, what the same operator gives on one unsharded rank from the source's own checkpoint, and
three more steps must have one rank's losses. Meshes have 1 to 8 ranks; 7 layers (which no pipeline divides), a SwiGLU
width of 90 and a vocabulary of 259 make all shards uneven.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.meshes import Case, mesh
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, relative_difference, trainer_of
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.chain import chain_of
from titan_growth.growth.read import read_grown
from titan_growth.growth.rules import Rules
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.models.roles import OPTIMIZER_PREFIX
from titan_growth.optimizers.base import state_of
from titan_growth.tools.findings import Findings

MESHES: dict[str, Case] = {
    "1 rank": mesh(),
    "fsdp2": mesh(shard=2),
    "tp2": mesh(tp=2),
    "pp3": mesh(pp=3),
    "hsdp 2x2": mesh(replicate=2, shard=2),
    "fsdp8": mesh(shard=8),
    "pp2 x fsdp2 x tp2": mesh(pp=2, shard=2, tp=2),
    "pp4 x fsdp2, Interleaved1F1B": mesh(pp=4, shard=2, schedule="Interleaved1F1B"),
    "fsdp2 x cp2 x tp2": mesh(shard=2, cp=2, tp=2),
}
OPERATORS: dict[str, dict[str, Any]] = {
    "stack": {"operator": "stack", "factor": 2},
    "interpose": {"operator": "interpose", "factor": 2},
    "zero_depth": {"operator": "zero_depth", "factor": 2},
    "zero_width": {"operator": "zero_width", "dim": 48, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 90},
    "split_width": {"operator": "split_width", "factor": 2, "noise": 0.01},
    "random_width": {"operator": "random_width", "factor": 2, "mask_steps": 4},
    "random_depth": {"operator": "random_depth", "factor": 2, "mask_steps": 4},
}
UNDER_MUON: dict[str, dict[str, Any]] = {
    "stack, Muon": {"operator": "stack", "factor": 2},
    "stack asymmetric, Muon": {"operator": "stack", "factor": 2, "optimizer_state": "asymmetric"},
    "random_width asymmetric, Muon": {**OPERATORS["random_width"], "optimizer_state": "asymmetric"},
    "split_width scaled, Muon": {**OPERATORS["split_width"], "optimizer_state": "copy_scaled"},
}
"""Trained in test_muon.py."""
MUON = {"optimizer__name": "Muon", "optimizer__lr": 5e-3}
UNDER_COMPLETEP: dict[str, dict[str, Any]] = {
    "zero_depth scaled, CompleteP": {**OPERATORS["zero_depth"], "optimizer_state": "copy_scaled"},
    "stack, CompleteP": OPERATORS["stack"],
    "zero_width, CompleteP": OPERATORS["zero_width"],
    "split_width scaled, CompleteP": {**OPERATORS["split_width"], "optimizer_state": "copy_scaled"},
}
"""Trained in test_completep.py."""
COMPLETEP = {
    "model__parametrization": "completep",
    "model__mup__base_dim": 16,
    "model__mup__base_n_layers": 2,
    "model__mup__base_head_dim": 4,
    "model__mup__base_hidden_dim": 45,
}
"""All factors are other than 1."""
DEPTH = ("stack", "interpose", "zero_depth", "random_depth")
QUICK = [("hsdp 2x2", "tp2", "stack")]
EVERYWHERE = ("stack", "interpose", "zero_depth")
WHOLE = [
    (source, target, operator)
    for row, source in enumerate(MESHES)
    for operator in OPERATORS
    for column, target in enumerate(MESHES)
    # The others read the same way; every mesh is their source three times and their target three times.
    if operator in EVERYWHERE or (row + column) % 3 == 0
]
STEPS = 3
BASE = {"n_layers": 7, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 90}


def recipe_of(folder: Path, source: Case, target: Case, operator: str) -> Any:
    """A run that starts on one mesh and continues on another from step 3."""
    wanted = {**OPERATORS, **UNDER_MUON, **UNDER_COMPLETEP}[operator]
    factor = wanted.get("factor", 1)
    grows = [key for key in BASE if (key == "n_layers") == (wanted["operator"] in DEPTH)]
    sizes = {key: wanted.get(key, size * factor) if key in grows else size for key, size in BASE.items()}
    layout = {key: value for key, value in target.layout.items() if key.startswith("parallelism")}
    stage = {
        "at": f"{STEPS} steps",
        "optimizer_state": "copy",
        **wanted,
        "lr_policy": "continue",
        "num_ranks": target.num_ranks,
        "local_batch_size": target.layout["training__local_batch_size"],
        "parallelism__data_parallel_shard_degree": -1,
        **layout,
    }
    return make_recipe(
        folder,
        **(MUON if operator in UNDER_MUON else COMPLETEP if operator in UNDER_COMPLETEP else {}),
        **source.layout,
        **{f"model__{key}": size for key, size in sizes.items()},
        **{f"growth__base__{key}": BASE[key] for key in grows},
        **{f"growth__stages__0__{key}": value for key, value in stage.items()},
        model__head_dim=8,
        model__vocab_size=259,
        training__steps=2 * STEPS,
        training__global_batch_size=8,
        checkpoint__enable=True,
        checkpoint__interval=100,
        lr_scheduler__warmup_steps=0,
    )


def until_the_growth(rank: int, num_ranks: int, recipe: Any) -> int | None:
    """Trains until the run asks for another number of ranks; returns that number."""
    with trainer_of(recipe, num_ranks) as trainer:
        assert not trainer.fit()
        return trainer.wanted_ranks


def grown_and_trained(rank: int, num_ranks: int, recipe: Any, reference: Path) -> tuple[list[str], int]:
    """Resumes, grows, compares this rank's tensors with the reference, trains on; (tensors that differ, compared)."""
    expected = torch.load(reference, weights_only=True)
    different, count = [], 0
    with trainer_of(recipe, num_ranks) as trainer:
        original = trainer.grow

        def grow_and_compare() -> bool:
            nonlocal count
            assert original()
            for name, tensor in trainer.runtime.tensors(optimizer=True).items():
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                count += 1
                if not torch.equal(full, expected[name]):
                    different.append(name)
            return True

        trainer.grow = grow_and_compare
        assert trainer.fit()
    return different, count


def grown_on_paper(checkpoint: Path, recipe: Any, path: Path, number: int = 0) -> None:
    """What a growth's operator makes of a checkpoint in one process, written to a file."""
    target = model_config_of(recipe.model, Findings())
    module = family_module(recipe.model.name)
    assert target is not None
    stage: PlannedGrowth = recipe.growth.stages[number]
    chain = chain_of(recipe.growth, target, found := Findings())
    assert chain is not None, found.problems
    growth = chain.maps[number]
    with torch.device("meta"):
        model = module.Decoder(growth.after, 32)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        tensors[name] = torch.empty(parameter.shape)
        for kept in state_of(recipe.optimizer, name, parameter.dim()):
            tensors[f"{OPTIMIZER_PREFIX}{name}.{kept.name}"] = torch.zeros(parameter.shape if kept.power else ())
    rules = Rules(growth, stage, module)
    seed = recipe.debug.seed + 1_000_003 * (number + 1)
    read_grown(SafeReader(checkpoint), tensors, rules, seed=seed)
    torch.save(tensors, path)


class Matrix:
    """Source checkpoints and one-rank runs, each made once."""

    def __init__(self, folder: Path, ranks: WarmRanks) -> None:
        self.folder = folder
        self.ranks = ranks

    def source(self, name: str, operator: str) -> Path:
        """The folder of a run that reached its growth on a mesh. Operators share none: recipes differ."""
        folder = self.folder / f"{name}-{operator}".replace(" ", "_").replace(",", "")
        if not folder.exists():
            case = MESHES[name]
            other = MESHES["1 rank" if case.num_ranks > 1 else "fsdp2"]
            recipe = recipe_of(folder, case, other, operator)
            wanted = self.ranks(until_the_growth, case.num_ranks, case.num_ranks, recipe)
            assert wanted == [other.num_ranks] * case.num_ranks
            grown_on_paper(folder / "checkpoint" / f"step-{STEPS}", recipe, folder / "grown.pt")
        return folder

    def grown(self, source: str, target: str, operator: str) -> list[dict[str, Any]]:
        """The steps after the growth on the target mesh; fails if any tensor differs from the reference."""
        origin = self.source(source, operator)
        folder = self.folder / f"{origin.name}-to-{target}".replace(" ", "_").replace(",", "")
        if not folder.exists():
            shutil.copytree(origin, folder)
            case = MESHES[target]
            recipe = recipe_of(folder, MESHES[source], case, operator)
            results = self.ranks(
                grown_and_trained, case.num_ranks, case.num_ranks, recipe, origin / "grown.pt", timeout_seconds=180
            )
            different = {name for names, _ in results for name in names}
            assert not different, f"not what one rank makes of them: {sorted(different)}"
            assert all(count > 20 for _, count in results)
        return [line for line in read_metrics(folder) if line["step"] > STEPS and "loss" in line]


def every_fourth(operators: Iterable[str]) -> list[Any]:
    """Slow cases: every fourth pair of meshes, other ones for each operator; all meshes are sources and targets."""
    return [
        pytest.param(source, target, operator, marks=pytest.mark.slow)
        for row, source in enumerate(MESHES)
        for number, operator in enumerate(operators)
        for column, target in enumerate(MESHES)
        if (row + column + number) % 4 == 0
    ]


def assert_same(matrix: Matrix, source: str, target: str, operator: str) -> None:
    found, expected = matrix.grown(source, target, operator), matrix.grown(source, "1 rank", operator)
    assert [line["step"] for line in found] == [4, 5, 6]
    for line, reference in zip(found, expected, strict=True):
        assert relative_difference(line, reference, "loss") < 1e-5
        assert relative_difference(line, reference, "grad_norm") < 1e-4


@pytest.mark.parametrize(("source", "target", "operator"), QUICK)
def test_some_of_the_matrix(source: str, target: str, operator: str, matrix: Matrix) -> None:
    assert_same(matrix, source, target, operator)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target", "operator"), WHOLE)
def test_the_whole_matrix(source: str, target: str, operator: str, matrix: Matrix) -> None:
    assert_same(matrix, source, target, operator)


THERE = {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "pipeline_parallel_microbatch_size": 1}


def there_and_back(rank: int, num_ranks: int, recipe: Any) -> dict[int, tuple[str, bool]]:
    """A run with two growths: step of each -> (its mesh, whether every tensor is what one rank makes)."""
    found = {}
    with trainer_of(recipe, num_ranks) as trainer:
        original = trainer.grow

        def grow_and_compare() -> bool:
            number = len(trainer.lineage.events)
            assert original()
            path = Path(recipe.job.dump_folder) / f"grown-{number}-{rank}.pt"
            step = trainer.progress.step
            grown_on_paper(trainer.checkpointer.root / f"step-{step}", recipe, path, number)
            expected = torch.load(path, weights_only=True)
            same = []
            for name, tensor in trainer.runtime.tensors(optimizer=True).items():
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                same.append(torch.equal(full, expected[name]))
            found[step] = (str(trainer.runtime.mesh.shape), all(same))
            return True

        trainer.grow = grow_and_compare
        assert trainer.fit()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_to_another_mesh_and_back_in_one_process(model: str, matrix: Matrix, tmp_path: Path) -> None:
    """fsdp 8, then pp 2 x fsdp 2 x tp 2, then fsdp 8 again: tensors bitwise, losses of one rank."""
    stages = {"at": "2 steps", "factor": 2, "optimizer_state": "copy", "lr_policy": "continue"}
    first = {f"growth__stages__0__{key}": value for key, value in stages.items()}
    second = {f"growth__stages__1__{key}": value for key, value in {**stages, "at": "4 steps"}.items()}
    common = {
        "model__name": model,
        "model__n_layers": 8,
        "training__steps": 6,
        "training__local_batch_size": 1,
        "checkpoint__enable": True,
        "checkpoint__interval": 100,
        **first,
        **second,
    }
    if model == "qwen3":
        common |= {"model__tie_word_embeddings": True, "model__hidden_dim": 64}
    run_alone = make_recipe(tmp_path / "alone", **common | {"training__local_batch_size": 8})
    matrix.ranks(there_and_back, 1, 1, run_alone)
    moving = {f"growth__stages__0__parallelism__{key}": value for key, value in THERE.items()}
    moving |= {"growth__stages__0__local_batch_size": 4}
    moving |= {
        "growth__stages__1__parallelism__data_parallel_shard_degree": 8,
        "growth__stages__1__local_batch_size": 1,
    }
    results = matrix.ranks(there_and_back, 8, 8, make_recipe(tmp_path / "moving", **common, **moving))
    for found in results:
        assert found == {2: ("pp 2 x dp_shard 2 x tp 2", True), 4: ("dp_shard 8", True)}
    lines, expected = (
        [line for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("moving", "alone")
    )
    assert [line["num_layers"] for line in lines] == [2, 2, 4, 4, 8, 8]
    for line, reference in zip(lines, expected, strict=True):
        assert relative_difference(line, reference, "loss") < 1e-5
