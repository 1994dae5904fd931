"""The elastic matrix: a run saved on any mesh goes on on any other, with the batches and the losses of one rank.

Each mesh trains three steps and saves; each mesh then resumes each of these checkpoints for three more. All losses must
be those of one rank that was never stopped, and the hashes of the global batches one and the same sequence. What a
recipe may change on a resume is tested beside it: it takes effect, and is said. `benchmarks/elastic.py` writes the
matrix's page.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import Case, mesh
from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, relative_difference, train, without_timings
from titan_growth.checkpoint.folder import open_step

MESHES: dict[str, Case] = {
    "1 rank": mesh(),
    "fsdp2": mesh(shard=2),
    "fsdp4": mesh(shard=4),
    "fsdp8": mesh(shard=8),
    "hsdp 2x2": mesh(replicate=2, shard=2),
    "fsdp2 x tp2": mesh(shard=2, tp=2),
    "pp2 x tp2": mesh(pp=2, tp=2),
    "pp2 x fsdp2": mesh(pp=2, shard=2),
    "pp2 x fsdp2 x tp2": mesh(pp=2, shard=2, tp=2),
}
QUICK = [("fsdp2", "pp2 x tp2"), ("fsdp2 x tp2", "1 rank")]
REST = [(source, target) for source in MESHES for target in MESHES if (source, target) not in QUICK]
SAVED, STEPS = 3, 6
TOLERANCE = 1e-5
"""Relative, of the losses, in float32."""
COMMON: dict[str, Any] = {
    "checkpoint__enable": True,
    "checkpoint__interval": SAVED,
    "debug__log_batch_hash": True,
    "lr_scheduler__total_steps": STEPS,
}

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Resumed:
    """A run on two meshes beside the unbroken one on one rank."""

    difference: float
    """The largest relative one of a loss."""
    one_sequence: bool
    """The hashes of the global batches are those of the unbroken run."""

    @property
    def holds(self) -> bool:
        return self.one_sequence and self.difference <= TOLERANCE


class Elastic:
    """Runs of the matrix, each made once."""

    def __init__(self, folder: Path, ranks: WarmRanks) -> None:
        self.folder = folder
        self.ranks = ranks

    def train(self, folder: Path, name: str, steps: int) -> None:
        case = MESHES[name]
        recipe = make_recipe(folder, **COMMON, **case.layout, training__steps=steps)
        self.ranks(train, case.num_ranks, case.num_ranks, recipe, timeout_seconds=180)

    def saved(self, name: str) -> Path:
        """A run that has been saved on a mesh."""
        folder = self.folder / f"{name} saved"
        if not folder.exists():
            self.train(folder, name, SAVED)
        return folder

    def unbroken(self) -> Lines:
        """All steps on one rank, in one go."""
        folder = self.folder / "unbroken"
        if not folder.exists():
            self.train(folder, "1 rank", STEPS)
        return steps_of(folder)

    def resumed(self, source: str, target: str) -> Resumed:
        """Goes on with a mesh's checkpoint on another mesh."""
        folder = self.folder / f"{source} to {target}"
        shutil.copytree(self.saved(source), folder)
        self.train(folder, target, STEPS)
        found, expected = steps_of(folder), self.unbroken()
        last = open_step(folder / "checkpoint" / f"step-{STEPS}")
        assert last is not None
        assert last.manifest.num_ranks == MESHES[target].num_ranks
        assert [line["step"] for line in found] == list(range(1, STEPS + 1))
        assert len({line["batch_hash"] for line in expected}) == STEPS, "all batches are different"
        return Resumed(
            max(relative_difference(*pair, "loss") for pair in zip(found, expected, strict=True)),
            [line["batch_hash"] for line in found] == [line["batch_hash"] for line in expected],
        )


def steps_of(folder: Path) -> Lines:
    """The lines of training steps."""
    return [line for line in read_metrics(folder) if "loss" in line]


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    ranks = WarmRanks()
    yield Elastic(tmp_path_factory.mktemp("elastic"), ranks)
    ranks.close()


@pytest.mark.parametrize(("source", "target"), QUICK)
def test_some_of_the_matrix(source: str, target: str, elastic: Elastic) -> None:
    resumed = elastic.resumed(source, target)
    assert resumed.one_sequence
    assert resumed.difference <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), REST)
def test_the_rest_of_the_matrix(source: str, target: str, elastic: Elastic) -> None:
    test_some_of_the_matrix(source, target, elastic)


def said_by_rank_0(rank: int, num_ranks: int, recipe: Any) -> list[str]:
    """Trains to the end; what the run has logged."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger("titan_growth"), Listener()
    logger.addHandler(listener)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        train(rank, num_ranks, recipe)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)
    return lines


def test_what_has_changed_takes_effect_and_is_said(tmp_path: Path) -> None:
    """A finished run is resumed longer, faster, on another mesh: each difference is a line, and nothing else is."""
    settings = {**COMMON, "lr_scheduler__warmup_steps": 0, "lr_scheduler__decay_ratio": 0.0}
    del settings["lr_scheduler__total_steps"]
    run_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings, training__steps=3))
    before = without_timings(read_metrics(tmp_path / "run"))
    changed = {"training__steps": 5, "optimizer__lr": 3e-3, "optimizer__beta2": 0.9, "checkpoint__interval": 4}
    changed |= {"parallelism__tensor_parallel_degree": 2}
    said = run_ranks(said_by_rank_0, 2, 2, make_recipe(tmp_path / "run", **{**settings, **changed}))[0]
    assert [line for line in said if line.startswith("changed since")] == [
        "changed since step-3: checkpoint.interval = 4 (was 3)",
        "changed since step-3: optimizer.beta2 = 0.9 (was 0.95)",
        "changed since step-3: optimizer.lr = 0.003 (was 0.01)",
        "changed since step-3: parallelism.tensor_parallel_degree = 2 (was 1)",
        "changed since step-3: training.steps = 5 (was 3)",
    ]
    assert any(line.startswith("resumed from") and line.endswith("step-3") for line in said)
    lines = without_timings(read_metrics(tmp_path / "run"))
    assert lines[:3] == before, "a longer run goes on; it does not begin again"
    assert [line["lr"] for line in lines] == [1e-2] * 3 + [3e-3] * 2
    assert {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()} == {"step-3", "step-4", "step-5"}
