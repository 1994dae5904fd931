"""Step folders without torch: what is committed, what is damaged, and which is the newest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from titan_growth.checkpoint.folder import file_entry, open_step, sha256_of, write_manifest
from titan_growth.checkpoint.history import GrowthEvent, Lineage, Progress
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.steps import CommittedSteps, committed_steps, step_numbers, step_path
from titan_growth.tools.errors import CheckpointError
from titan_growth.tools.sealed import sealed

MANIFEST = Manifest(
    progress=Progress(step=7, tokens=70, flops=10**21, samples=14),
    num_layers=3,
    num_ranks=4,
    mesh="dp_shard 4",
    model_only=False,
    permanent=True,
    metrics_offset=123,
    data={"corpus": "ab"},
)
EVENT = GrowthEvent(
    step=10, tokens=1, flops=10**20, operator="stack", stage={"at": "10 steps", "factor": 2},
    from_sizes={"n_layers": 2}, to_sizes={"n_layers": 4}, layer_map=(0, 1, 0, None), source="step-10", mesh="1 rank",
    num_ranks=1, loss_before=2.5, loss_after=3.125, seconds=1.5, bytes_read=10**12,
)  # fmt: skip


def commit(root: Path, step: int, **changes: object) -> Path:
    """A committed folder with two small files."""
    path = step_path(root, step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"shard of rank 0")
    (path / "recipe.toml").write_text("[training]\nsteps = 3\n")
    files = {name: file_entry(path / name) for name in ("__0_0.distcp", "recipe.toml")}
    progress = Progress(step=step)
    write_manifest(path, replace(MANIFEST, progress=progress, files=files, **changes))  # type: ignore[arg-type]
    return path


def test_manifest_round_trip() -> None:
    manifest = replace(MANIFEST, files={"a": {"bytes": 3, "sha256": "x"}})
    assert Manifest.from_json(manifest.to_json()) == manifest
    table = json.loads(manifest.to_json())
    assert table["step"] == 7
    assert table["files"]["a"] == {"bytes": 3, "sha256": "x"}


def test_lineage_round_trip() -> None:
    lineage = Lineage((EVENT, replace(EVENT, step=20)))
    assert Lineage.from_dict(json.loads(lineage.to_json())) == lineage
    assert lineage.grown_at == [10, 20]
    assert not {"parents", "averaged"} & json.loads(lineage.to_json()).keys()
    averaged = replace(lineage, averaged=("run/step-1", "run/step-2"))
    assert Lineage.from_dict(json.loads(averaged.to_json())) == averaged
    assert Lineage.from_dict({"events": []}) == Lineage()


def test_progress_never_restarts() -> None:
    later = Progress(step=3, tokens=30, flops=300, samples=6).advanced(tokens=10, flops=1000, samples=2)
    assert later == Progress(step=4, tokens=40, flops=1300, samples=8)


def test_a_committed_folder_opens(tmp_path: Path) -> None:
    folder = open_step(commit(tmp_path, 12))
    assert folder is not None
    assert folder.step == 12
    assert folder.recipe_table() == {"training": {"steps": 3}}
    assert folder.damage(checksums=True) is None


def test_a_manifest_cut_anywhere_is_not_committed_or_refused(tmp_path: Path) -> None:
    """A process killed while writing leaves a prefix; no prefix may pass for a manifest."""
    path = commit(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    for length in range(len(text) - 1):
        (path / "manifest.json").write_text(text[:length])
        with pytest.raises(CheckpointError, match=r"step-1 refused: manifest\.json (is not valid|ends in|is empty)"):
            open_step(path)
    (path / "manifest.json").write_text(text[:-1])
    assert open_step(path) is not None, "a tool has written it again, without the last newline"
    (path / "manifest.json").unlink()
    assert open_step(path) is None
    assert open_step(tmp_path / "nowhere") is None
    assert committed_steps(tmp_path / "nowhere") == CommittedSteps([], [])


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b"])
def test_a_manifest_cannot_name_files_outside_its_folder(name: str, tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    table = json.loads((path / "manifest.json").read_text())
    table["files"][name] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(sealed(table))
    with pytest.raises(CheckpointError, match=r"step-1 refused: manifest\.json is not valid \(names a file outside"):
        open_step(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"step": "seven"},
        {"step": None},
        {"files": None},
        {"files": []},
        {"files": {"a": 3}},
        {"files": {"a": {"bytes": "x", "sha256": "0"}}},
        {"files": {"a": {"bytes": 3}}},
        {"unknown": 3},
    ],
)
def test_a_manifest_that_is_not_one_is_refused_in_one_line(change: dict[str, object], tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    table = json.loads((path / "manifest.json").read_text()) | change
    (path / "manifest.json").write_text(sealed(table))
    with pytest.raises(CheckpointError, match=r"^step-1 refused: manifest.json is not valid [^\n]*$"):
        open_step(path)
    for key in ("step", "files", "num_layers", "format"):
        cut = {name: value for name, value in table.items() if name != key}
        (path / "manifest.json").write_text(sealed(cut))
        with pytest.raises(CheckpointError, match="step-1 refused"):
            open_step(path)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """A digit of the data cursor that flips into another digit leaves a well-formed manifest."""
    path = commit(tmp_path, 1)
    whole = (path / "manifest.json").read_bytes()
    opened = open_step(path)
    for place in range(len(whole)):
        for bit in (0, 1, 4):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            (path / "manifest.json").write_bytes(flipped)
            try:
                found = open_step(path)
            except CheckpointError:
                continue
            assert found is None or found == opened, f"byte {place}: {whole[place : place + 1]!r}"
    table = json.loads(whole)
    del table["sha256"]
    (path / "manifest.json").write_text(json.dumps(table) + "\n")
    assert open_step(path) == opened, "the first manifests had no checksum of their own"


@pytest.mark.parametrize("text", ["[]", "{}", "3", '"x"', "\x00", "[1}"])
def test_a_manifest_that_is_not_a_table(text: str, tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    (path / "manifest.json").write_text(text + "\n")
    try:
        assert open_step(path) is None
    except CheckpointError as error:
        assert str(error).startswith("step-1 refused")  # noqa: PT017
    (path / "manifest.json").write_bytes(b"\xff\xfe}\n")
    with pytest.raises(CheckpointError, match=r"step-1 refused: manifest\.json cannot be read"):
        open_step(path)


def test_damage_is_named(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    folder = open_step(path)
    assert folder is not None
    shard = path / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(b"Shard of rank 0")
    assert folder.damage(checksums=False) is None
    assert folder.damage(checksums=True) == "__0_0.distcp does not match its checksum"
    shard.write_bytes(whole[:-1])
    assert folder.damage(checksums=False) == "__0_0.distcp has 14 bytes instead of 15"
    shard.unlink()
    assert folder.damage(checksums=False) == "__0_0.distcp is missing"
    shard.mkdir()
    assert folder.damage(checksums=False) == "__0_0.distcp is not a file"
    shard.rmdir()
    shard.symlink_to(shard)
    assert folder.damage(checksums=False) == "__0_0.distcp cannot be read (Too many levels of symbolic links)"


def test_ranks_divide_the_files(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    (path / "recipe.toml").write_text("[training]\nsteps = 4\n")
    folder = open_step(path)
    assert folder is not None
    found = [folder.damage(checksums=True, share=(rank, 3)) for rank in range(3)]
    assert found == [None, "recipe.toml does not match its checksum", None]


def test_steps_are_numbers(tmp_path: Path) -> None:
    """step-10 comes after step-9, although not alphabetically."""
    for step in (9, 10, 100, 99, 1):
        commit(tmp_path, step)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "superseded-200").mkdir()
    (tmp_path / "step-300").write_text("a file")
    (tmp_path / "step-400").mkdir()  # not committed
    assert step_numbers(tmp_path) == [400, 100, 99, 10, 9, 1]
    found = committed_steps(tmp_path)
    assert [folder.step for folder in found.usable] == [100, 99, 10, 9, 1]
    untold = "and whether it was ever committed cannot be told: there is no ledger.json"
    assert [str(error) for error in found.refused] == [
        f"step-400 refused: it has no manifest.json, {untold}",
        f"step-300 refused: it is not a folder, {untold}",
    ]
    assert step_numbers(tmp_path / "nowhere") == []


def test_the_newest_intact_one_is_found_and_damaged_ones_are_reported(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        commit(tmp_path, step)
    (tmp_path / "step-15" / "recipe.toml").unlink()
    (tmp_path / "step-10" / "manifest.json").write_text('{"format": 2}\n')
    found = committed_steps(tmp_path)
    assert [folder.step for folder in found.usable] == [5]
    refused = [str(error) for error in found.refused]
    assert refused[0] == "step-15 refused: recipe.toml is missing"
    assert refused[1].startswith("step-10 refused: manifest.json is not valid (written by another version)")


def test_checksums_of_large_files(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"ab" * (5 << 20))
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_entry(path)["bytes"] == 10 << 20
