"""The ledger: what it says of a step without a manifest, and what a run may do by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checkpoint.test_folder import commit
from titan_growth.checkpoint.ledger import Ledger, LedgerFile, read_ledger
from titan_growth.checkpoint.rewind import pending_fresh_start, pending_load_step
from titan_growth.checkpoint.steps import committed_steps
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.errors import CheckpointError


def test_round_trip(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "nowhere") is None
    file = LedgerFile(tmp_path / "checkpoint")
    file.begin([4, 2], started_fresh=True)
    file.enter(6)
    file.enter(6)
    file.strike([2, 3])
    assert read_ledger(file.root) == Ledger((4, 6), started_fresh=True)
    assert LedgerFile(file.root).steps == (4, 6)


def test_every_bit_of_a_ledger_counts(tmp_path: Path) -> None:
    LedgerFile(tmp_path).begin([100, 200], started_fresh=False)
    path, whole = tmp_path / "ledger.json", read_ledger(tmp_path)
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        try:
            assert read_ledger(tmp_path) == whole, f"byte {place}: {data[place : place + 1]!r}"
        except CheckpointError as error:
            assert str(error).startswith("ledger.json cannot be read (")  # noqa: PT017


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "steps": [1.5]}', '{"format": 1'])
def test_what_is_no_ledger_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^ledger\.json cannot be read \("):
        read_ledger(tmp_path)


def test_a_ledger_lost_during_the_run_is_whole_with_the_next_commit(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path)
    file.begin([2], started_fresh=True)
    (tmp_path / "ledger.json").write_text("")
    file.enter(4)
    assert read_ledger(tmp_path) == Ledger((2, 4), started_fresh=True)


def test_what_stands_in_the_place_of_the_ledger_is_kept(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").mkdir()
    (tmp_path / "ledger.json" / "x").write_text("somebody's")
    LedgerFile(tmp_path).begin([], started_fresh=False)
    assert read_ledger(tmp_path) == Ledger()
    assert (tmp_path / "damaged-ledger.json" / "x").read_text() == "somebody's"
    (tmp_path / "ledger.json").unlink()
    (tmp_path / "ledger.json").mkdir()
    (tmp_path / "ledger.json" / "x").write_text("somebody else's")
    LedgerFile(tmp_path).begin([], started_fresh=False)
    assert (tmp_path / "damaged-ledger.json" / "x").read_text() == "somebody's"
    assert (tmp_path / "damaged-ledger.json-2" / "x").read_text() == "somebody else's"


def _lose(path: Path, how: str) -> None:
    manifest = path / "manifest.json"
    if how == "deleted":
        manifest.unlink()
    elif how == "folder gone":
        path.rename(path.with_name("elsewhere"))
    else:
        manifest.write_text({"emptied": "", "truncated": manifest.read_text()[:100]}[how])


LOST = {
    "deleted": "it has no manifest.json",
    "folder gone": "its folder is gone",
    "emptied": "manifest.json is empty",
    "truncated": "manifest.json ends in the middle",
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_manifest_is_damage_and_an_unfinished_save_is_not(how: str, tmp_path: Path) -> None:
    for step in (2, 4):
        commit(tmp_path, step)
    ledger = LedgerFile(tmp_path)
    _lose(tmp_path / "step-4", how)

    def told() -> tuple[list[int], list[str], list[str]]:
        found = committed_steps(tmp_path)
        return [one.step for one in found.usable], [*map(str, found.refused)], [*map(str, found.unfinished)]

    untold = f"step-4 refused: {LOST[how]}, and whether it was ever committed cannot be told: "
    there = how != "folder gone"
    assert told() == ([2], [f"{untold}there is no ledger.json"] * there, [])
    ledger.begin([2, 4], started_fresh=False)
    assert told() == ([2], [f"step-4 refused: {LOST[how]}, though the ledger lists it"], [])
    ledger.begin([2], started_fresh=False)
    assert told() == ([2], [], [f"step-4 refused: {LOST[how]}, and by the ledger it was never committed"] * there)
    (tmp_path / "ledger.json").write_text("{}")
    unreadable = "ledger.json cannot be read (it has no 'format')"
    assert told() == ([2], [f"{untold}{unreadable}"] * there, [])


def test_a_late_listing_hides_no_committed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        commit(tmp_path, step)
    LedgerFile(tmp_path).begin([2, 4], started_fresh=False)
    monkeypatch.setattr("titan_growth.checkpoint.steps._listed", lambda root: {2: True})
    assert [one.step for one in committed_steps(tmp_path).usable] == [4, 2]


def test_another_programs_folder_among_the_steps_needs_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "step-9").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "step-9")
    assert committed_steps(tmp_path, spare=link).refused == []
    assert len(committed_steps(tmp_path).refused) == 1


def test_a_fresh_start_is_obeyed_once(tmp_path: Path) -> None:
    section, fresh = CheckpointConfig(enable=True), CheckpointConfig(enable=True, start_fresh=True)
    ledger = LedgerFile(tmp_path)
    assert not pending_fresh_start(section, tmp_path)
    assert pending_fresh_start(fresh, tmp_path), "there may be an earlier run without a ledger"
    ledger.begin([], started_fresh=True)
    assert not pending_fresh_start(fresh, tmp_path)
    ledger.begin([2], started_fresh=False)
    assert pending_fresh_start(fresh, tmp_path), "a launch without it came in between"
    (tmp_path / "ledger.json").write_text("x")
    with pytest.raises(CheckpointError, match=r"whether the run in .* has started afresh before cannot be told"):
        pending_fresh_start(fresh, tmp_path)


def test_a_damaged_marker_does_not_send_a_run_back_again(tmp_path: Path) -> None:
    section = CheckpointConfig(enable=True, load_step=4)
    assert pending_load_step(section, tmp_path) == 4
    marker = tmp_path / "gone-back-to"
    marker.write_text("4\n")
    assert pending_load_step(section, tmp_path) == -1
    for damage in (
        lambda: marker.write_text(""),
        lambda: marker.write_text("four"),
        lambda: marker.write_bytes(b"\xff"),
    ):
        damage()
        with pytest.raises(CheckpointError, match="whether the run has gone back to step 4 before cannot be told"):
            pending_load_step(section, tmp_path)
        assert pending_load_step(CheckpointConfig(enable=True), tmp_path) == -1
