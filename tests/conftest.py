"""Imports the distributed modules once, so that forked ranks start in a fraction of a second."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor
import torch.distributed.tensor.parallel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One prepared-data cache for all tests that train."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _private_cache(session_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's own cache."""
    monkeypatch.setenv("TITAN_GROWTH_CACHE", session_cache)
