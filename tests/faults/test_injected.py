"""Every row of the fault table, injected into a real `run_train.sh`; `-k one_point` plays one of each fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.broken_runs import Workshop
from tests.faults.injected import play, unmount_below
from tests.faults.rows import Row
from tests.faults.table import ROWS

QUICK = [row for row in ROWS if row.quick]
REST = [row for row in ROWS if not row.quick]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """The unbroken runs are made once."""
    folder = tmp_path_factory.mktemp("faults")
    yield Workshop(folder)
    unmount_below(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", QUICK, ids=[row.name for row in QUICK])
def test_nothing_is_lost_at_one_point(row: Row, shop: Workshop, tmp_path: Path) -> None:
    judge(row, shop, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", REST, ids=[row.name for row in REST])
def test_nothing_is_lost_at_the_others(row: Row, shop: Workshop, tmp_path: Path) -> None:
    judge(row, shop, tmp_path)


def judge(row: Row, shop: Workshop, tmp_path: Path) -> None:
    found = play(row, shop, tmp_path / "row")
    if found["ok"] is None:
        pytest.skip(found["sees"])
    assert not found["wrong"], found


def test_every_fault_has_a_quick_row() -> None:
    assert {row.fault for row in QUICK} == {row.fault for row in ROWS}
    assert len({row.name for row in ROWS}) == len(ROWS), "two rows have one name"
