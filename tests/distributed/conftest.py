"""Cached runs and imports, shared by the tests of one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.test_growth_across_meshes import Matrix
from tests.harness import WarmRanks
from tests.runs import make_recipe, read_metrics, train

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trained(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lines]:
    """`trained(num_ranks, **settings)`: the metrics of that run, trained once per file."""
    folder = tmp_path_factory.mktemp("trained")
    known: dict[str, Lines] = {}

    def lines_of(num_ranks: int, **settings: Any) -> Lines:
        key = json.dumps([num_ranks, settings], sort_keys=True)
        if key not in known:
            recipe = make_recipe(folder / f"run-{len(known)}", **settings)
            warm_ranks(train, num_ranks, num_ranks, recipe, timeout_seconds=250)
            known[key] = read_metrics(folder / f"run-{len(known)}")
        return known[key]

    return lines_of


@pytest.fixture(scope="module")
def matrix(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Growths from mesh to mesh, each made once per file."""
    return Matrix(tmp_path_factory.mktemp("matrix"), warm_ranks)


@pytest.fixture(scope="module")
def warm_imports() -> None:
    """Imports the compiler and torchao (4 s) once, before ranks are forked from this process."""
    import torchao.float8  # noqa: F401

    torch.compile(torch.nn.Linear(1, 1), backend="aot_eager")(torch.zeros(1, 1))
    torch._dynamo.reset()
