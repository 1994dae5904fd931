"""A run killed at random moments, by a few deaths instead of sixty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.broken_runs import Workshop
from tests.faults.soak import play


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("mesh", "alternates"), [("pp", True), ("fsdp", False)], ids=["pp, async saves", "fsdp"])
def test_it_ends_as_the_undisturbed_run(mesh: str, alternates: bool, tmp_path: Path) -> None:
    soak = play(Workshop(tmp_path), mesh, kills=12, through_launcher=3, alternates=alternates)
    assert len(soak.deaths) == 12
    assert not soak.wrong
