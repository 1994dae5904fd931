"""Imports the distributed modules once, so that forked ranks start in a fraction of a second."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor
import torch.distributed.tensor.parallel

from tests.harness import PATIENCE, WarmRanks
from tests.thinning import thin

pytest_plugins = ("pytester",)
DEFAULT = "not slow and not exhaustive and not gpu"
"""What pyproject.toml chooses when nothing is asked for."""

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the default suite, which keeps one and a third cores busy; none more for a chosen few tests.

    The slow tests fill two cores with their ranks.
    """
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.keyword
    return 0 if chosen or config.option.markexpr != DEFAULT else 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before anything is chosen by marks; limits of single tests are as patient as those of ranks."""
    thin(items)
    for item in items:
        if PATIENCE != 1 and (limit := item.get_closest_marker("timeout")):
            item.add_marker(pytest.mark.timeout(PATIENCE * limit.args[0]), append=False)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One prepared-data cache for all tests that train."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def warm_ranks() -> Iterator[WarmRanks]:
    """Called like `run_ranks`; shared by the tests of one file."""
    ranks = WarmRanks()
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def _private_cache(session_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's own cache."""
    monkeypatch.setenv("TITAN_GROWTH_CACHE", session_cache)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """Entry points send the package's log to the standard output of the moment; no test inherits that."""
    logger = logging.getLogger("titan_growth")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)
