"""Each file of a run damaged in each way: no start from scratch, and none in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.lost_files import DAMAGES, Case, cases, play, templates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    return templates(tmp_path_factory.mktemp("lost-files"))


def test_a_lost_manifest_starts_nothing_from_scratch(tmp_path: Path, made) -> None:
    for count, expected in ((1, 2), (3, 0)):
        case = Case(count, False, "run/checkpoint/step-6/manifest.json", "deleted")
        row = play(case, made[count, False], tmp_path / str(count))
        assert not row.wrong, row.screen
        assert row.status == expected
        assert "step-6 refused: it has no manifest.json, though the ledger lists it" in row.screen


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_start_from_scratch_and_none_in_silence(damage: str, tmp_path: Path, made) -> None:
    rows = []
    for number, case in enumerate(one for one in cases(made) if one.damage == damage):
        rows.append(play(case, made[case.num_checkpoints, case.remote], tmp_path / str(number)))
    wrong = {row.case.name: (row.wrong, row.message) for row in rows if row.wrong}
    assert len(rows) > 20
    assert not wrong
