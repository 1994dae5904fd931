"""A run saved on one mesh resumes on another, with the batches and losses of one rank.

Two pairs of the matrix; `tests/faults/test_elastic.py` covers all. What a recipe may change on a resume is
tested beside it: it takes effect, and is logged.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.faults.elastic import COMMON, QUICK, TOLERANCE, Elastic
from tests.harness import WarmRanks, run_ranks
from tests.runs import make_recipe, read_metrics, train, without_timings


@pytest.fixture(scope="module")
def elastic(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Elastic:
    return Elastic(tmp_path_factory.mktemp("elastic"), warm_ranks)


@pytest.mark.parametrize(("source", "target"), QUICK)
def test_some_of_the_matrix(source: str, target: str, elastic: Elastic) -> None:
    resumed = elastic.resumed(source, target)
    assert resumed.one_sequence
    assert resumed.difference <= TOLERANCE


def logged_by_rank_0(rank: int, num_ranks: int, recipe: Any) -> list[str]:
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


def test_what_has_changed_takes_effect_and_is_logged(tmp_path: Path) -> None:
    """A finished run resumes with more steps, another rate and mesh: one line per difference, and no others."""
    settings = {**COMMON, "lr_scheduler__warmup_steps": 0, "lr_scheduler__decay_ratio": 0.0}
    del settings["lr_scheduler__total_steps"]
    run_ranks(train, 1, 1, make_recipe(tmp_path / "run", **settings, training__steps=3))
    before = without_timings(read_metrics(tmp_path / "run"))
    changed = {"training__steps": 5, "optimizer__lr": 3e-3, "optimizer__beta2": 0.9, "checkpoint__interval": 4}
    changed |= {"parallelism__tensor_parallel_degree": 2}
    logged = run_ranks(logged_by_rank_0, 2, 2, make_recipe(tmp_path / "run", **{**settings, **changed}))[0]
    assert [line for line in logged if line.startswith("changed since")] == [
        "changed since step-3: checkpoint.interval = 4 (was 3)",
        "changed since step-3: optimizer.beta2 = 0.9 (was 0.95)",
        "changed since step-3: optimizer.lr = 0.003 (was 0.01)",
        "changed since step-3: parallelism.tensor_parallel_degree = 2 (was 1)",
        "changed since step-3: training.steps = 5 (was 3)",
    ]
    assert any(line.startswith("resumed from") and line.endswith("step-3") for line in logged)
    lines = without_timings(read_metrics(tmp_path / "run"))
    assert lines[:3] == before, "a longer run goes on; it does not begin again"
    assert [line["lr"] for line in lines] == [1e-2] * 3 + [3e-3] * 2
    assert {path.name for path in (tmp_path / "run" / "checkpoint").glob("*-*")} == {"step-3", "step-4", "step-5"}
