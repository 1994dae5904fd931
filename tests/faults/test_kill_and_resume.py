"""The default recipe, killed at random moments and resumed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.kill_and_resume import PRECISIONS, RANKS, play


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_it_ends_as_the_unbroken_run(num_ranks: int, precision: str, tmp_path: Path) -> None:
    killed = play(num_ranks, precision, 6, tmp_path, random.Random(0))
    assert killed.steps
    assert not killed.wrong
