"""The second family on meshes, through growth and resume: stages know its modules only through its declarations.

Smaller sizes tie the embedding. Under a pipeline, embedding and head are then two copies on two ranks, which must start
equal, stay equal, and be one again when another mesh reads the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, train

MODEL: dict[str, Any] = {"model__name": "qwen3", "model__head_dim": 16}  # wider together than the model's 32

FSDP = {"parallelism__data_parallel_shard_degree": -1}
PP = {"parallelism__pipeline_parallel_degree": 2, "parallelism__data_parallel_shard_degree": 1}
TP = {"parallelism__tensor_parallel_degree": 2, "parallelism__data_parallel_shard_degree": 1}
MESHES = {"fsdp2": FSDP, "tp2": TP, "pp2": PP}

SAVING = {"checkpoint__enable": True, "checkpoint__interval": 100}
GROWING = {**SAVING, "training__steps": 5, "growth__stages": '[{at = "3 steps", factor = 2, optimizer_state = "copy"}]'}


Lines = list[dict[str, Any]]
Run = Callable[..., Lines]


@pytest.fixture(scope="module")
def run(warm_ranks: WarmRanks) -> Run:
    """`run(folder, num_ranks, **settings)` trains to the end and returns the lines of the steps."""

    def lines_of(folder: Path, num_ranks: int, **settings: Any) -> Lines:
        warm_ranks(train, num_ranks, num_ranks, make_recipe(folder, **MODEL, **settings))
        return [line for line in read_metrics(folder) if "loss" in line]

    return lines_of


def assert_agree(found: Lines, expected: Lines, steps: list[int]) -> None:
    """Loss and gradient norm to 1e-5 at the first step, then to 1e-4."""
    assert [line["step"] for line in found] == [line["step"] for line in expected] == steps
    for line, reference in zip(found, expected, strict=True):
        tolerance = 1e-5 if line["step"] == 1 else 1e-4
        assert line["loss"] == pytest.approx(reference["loss"], rel=tolerance)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=tolerance)


def stored(step_folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step folder, read with PyTorch's own converter."""
    target = step_folder.parent / f"{step_folder.name}.pt"
    dcp_to_torch_save(step_folder, target)
    return torch.load(target, weights_only=True)


def assert_copies_are_equal(step_folder: Path) -> None:
    """Head and embedding, and their moments, bit for bit."""
    tensors = stored(step_folder)
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        one, other = (tensors[f"optimizer.state.{name}.weight.{key}"] for name in ("output", "tok_embeddings"))
        assert torch.equal(one, other), key
        assert one.any(), key


def cases(mesh: str, tied: bool) -> list[Any]:
    """(meshes, whether the head is tied): one for the default suite, all of them behind `-m slow`."""
    return [([mesh], tied), *(pytest.param([*MESHES], tied, marks=pytest.mark.slow) for tied in (False, True))]


@pytest.mark.parametrize(("names", "tied"), cases("tp2", tied=True))
def test_meshes_agree_with_one_rank(names: list[str], tied: bool, run: Run, tmp_path: Path) -> None:
    settings = {"training__steps": 3, "model__tie_word_embeddings": tied}
    expected = run(tmp_path / "one", 1, **settings)
    for name in names:
        assert_agree(run(tmp_path / name, 2, **settings, **MESHES[name]), expected, [1, 2, 3])


@pytest.mark.parametrize(("names", "tied"), cases("pp2", tied=False))
def test_growth_on_every_mesh(names: list[str], tied: bool, run: Run, tmp_path: Path) -> None:
    """2 layers grown to 4 with their moments; the grown model is verified by the run itself."""
    settings = {**GROWING, "model__tie_word_embeddings": tied}
    expected = run(tmp_path / "one", 1, **settings)
    for name in names:
        mesh = MESHES[name]
        assert_agree(run(tmp_path / name, 2, **settings, **mesh), expected, [1, 2, 3, 4, 5])
        (event,) = [line for line in read_metrics(tmp_path / name) if "event" in line]
        assert (event["from_layers"], event["to_layers"]) == (2, 4)
        names = set(stored(tmp_path / name / "checkpoint" / "step-5"))
        assert {f"layers.3.attention.{norm}.weight" for norm in ("q_norm", "k_norm")} <= names


MOVED = {**SAVING, "model__tie_word_embeddings": True, "lr_scheduler__decay_ratio": 0.0}


@pytest.fixture(scope="module")
def unmoved(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """The lines of one rank that was never stopped."""
    return run(tmp_path_factory.mktemp("unmoved") / "one", 1, **MOVED, training__steps=6)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("pp2", "fsdp2"),
        ("tp2", "pp2"),
        pytest.param("fsdp2", "pp2", marks=pytest.mark.slow),
        pytest.param("pp2", "tp2", marks=pytest.mark.slow),
    ],
)
def test_tied_weights_move_between_meshes(first: str, then: str, run: Run, unmoved: Lines, tmp_path: Path) -> None:
    """A checkpoint names both copies and their moments, whether they were two parameters or one."""
    run(tmp_path / "moved", 2, **MOVED, **MESHES[first], training__steps=3)
    found = run(tmp_path / "moved", 2, **MOVED, **MESHES[then], training__steps=6)
    assert_agree(found, unmoved, [1, 2, 3, 4, 5, 6])
    for step in (3, 6):
        assert_copies_are_equal(tmp_path / "moved" / "checkpoint" / f"step-{step}")
