"""Reading DCP folders: nothing in them is run, chunks are read once, other names and other shards are served."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.harness import run_ranks
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.growth.reader import grown_names
from titan_growth.tools.errors import CheckpointError

STORED = {
    "tok.weight": torch.arange(12.0).view(4, 3),
    "layers.0.w": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "layers.1.w": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
    "optimizer.state.layers.0.w.exp_avg": torch.full((5, 3), 0.5),
    "optimizer.state.layers.1.w.exp_avg": torch.full((5, 3), 1.5),
    "step": torch.tensor(7.0),
    "half": torch.arange(6).to(torch.bfloat16),
}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step-5"
    dcp.save(dict(STORED), checkpoint_id=path, no_dist=True)
    return path


def load(tensors: dict[str, Any], reader: SafeReader) -> None:
    dcp.load(tensors, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)


def change_metadata(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    changed = change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))


def test_tensors_come_back(folder: Path) -> None:
    wanted = {name: torch.full_like(tensor, 99) for name, tensor in STORED.items()}
    reader = SafeReader(folder)
    load(wanted, reader)
    assert all(torch.equal(wanted[name], STORED[name]) for name in STORED)
    assert reader.num_chunks_read == len(STORED)
    assert set(reader.tensor_entries()) == set(STORED)


def test_a_chunk_that_feeds_four_tensors_is_read_once(folder: Path) -> None:
    """2 layers stacked 4 times: 8 layers and 8 moments from 4 stored chunks."""
    names_of = grown_names((0, 1) * 4)
    wanted = {f"layers.{layer}.w": torch.zeros(5, 3) for layer in range(8)}
    wanted |= {f"optimizer.state.layers.{layer}.w.exp_avg": torch.zeros(5, 3) for layer in range(8)}
    reader = SafeReader(folder, names_of)
    load(wanted, reader)
    for layer in range(8):
        assert torch.equal(wanted[f"layers.{layer}.w"], STORED[f"layers.{layer % 2}.w"])
        name = f"optimizer.state.layers.{layer % 2}.w.exp_avg"
        assert torch.equal(wanted[f"optimizer.state.layers.{layer}.w.exp_avg"], STORED[name])
    assert reader.num_chunks_read == 4
    once = SafeReader(folder)
    load({name: torch.zeros(5, 3) for name in STORED if "layers" in name}, once)
    assert reader.num_bytes_read == once.num_bytes_read > 0


def _grown_shards(rank: int, path: str) -> tuple[int, bool]:
    mesh = init_device_mesh("cpu", (2,))
    wanted = {f"layers.{i}.w": distribute_tensor(torch.zeros(5, 3), mesh, (Shard(0),)) for i in range(6)}
    reader = SafeReader(Path(path), grown_names((0, 1) * 3))
    dcp.load(wanted, storage_reader=reader, planner=DefaultLoadPlanner())
    right = all(torch.equal(wanted[f"layers.{i}.w"].full_tensor(), STORED[f"layers.{i % 2}.w"]) for i in range(6))
    return reader.num_chunks_read, right


def test_growing_and_resharding_are_one_read(folder: Path) -> None:
    """From one rank's file to uneven row shards on two."""
    assert run_ranks(_grown_shards, 2, str(folder)) == [(2, True), (2, True)]


def test_growing_under_other_names_lists_them(folder: Path) -> None:
    entries = SafeReader(folder, grown_names((1, 1, 1))).tensor_entries()
    assert {name for name in entries if name.startswith("layers")} == {f"layers.{i}.w" for i in range(3)}
    assert entries["layers.2.w"].size == torch.Size([5, 3])
    assert entries["half"].properties.dtype == torch.bfloat16


# ---- hostile and damaged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_hostile_metadata_is_refused_without_running(inside: bool, folder: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    if inside:

        def plant(metadata: Any) -> None:
            metadata.planner_data = {"x": bomb}

        change_metadata(folder, plant)
    else:
        (folder / ".metadata").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"^step-5 refused: its metadata asks for posix\.mkdir$"):
        SafeReader(folder).read_metadata()
    assert not bomb.path.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert bomb.path.exists(), "the bomb of this test does not go off at all"


@pytest.mark.parametrize(
    "name", ["builtins\neval", "builtins\ngetattr", "os\nsystem", "torch\nload", "torch.serialization\nload",
             "torch\nSize.__class__", "pathlib\nPath.home", "functools\npartial"]
)  # fmt: skip
def test_other_globals_are_refused(name: str, folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(CheckpointError, match="step-5 refused: its metadata asks for"):
        SafeReader(folder).read_metadata()


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_damaged_metadata_is_one_line(data: bytes, folder: Path) -> None:
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^step-5 refused: [^\n]+$"):
        SafeReader(folder).read_metadata()


def test_metadata_cut_anywhere_is_one_line(folder: Path) -> None:
    whole = (folder / ".metadata").read_bytes()
    for length in range(0, len(whole), 37):
        (folder / ".metadata").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"^step-5 refused: "):
            SafeReader(folder).read_metadata()


def test_no_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"step-5 refused: it has no \.metadata"):
        SafeReader(folder).tensor_entries()


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "a/b", ".metadata", "..\\x"])
def test_metadata_cannot_name_files_outside_its_folder(path: str, folder: Path) -> None:
    def redirect(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = path

    change_metadata(folder, redirect)
    with pytest.raises(CheckpointError, match="step-5 refused: it names the file"):
        SafeReader(folder).read_metadata()


@pytest.mark.parametrize(("field", "value"), [("storage_data", None), ("storage_data", {"a": 3}),
                                              ("storage_data", {3: None}), ("state_dict_metadata", None),
                                              ("state_dict_metadata", [1])])  # fmt: skip
def test_metadata_of_the_wrong_shape_is_one_line(field: str, value: object, folder: Path) -> None:
    change_metadata(folder, lambda metadata: setattr(metadata, field, value))
    with pytest.raises(CheckpointError, match=r"^step-5 refused: [^\n]+$"):
        SafeReader(folder, grown_names((0, 0))).tensor_entries()


def shard_holding(folder: Path, value: object) -> None:
    """Puts something else where layers.0.w is stored."""
    buffer = io.BytesIO()
    torch.save(value, buffer)

    def redirect(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "layers.0.w":
                info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(buffer.getvalue())

    (folder / "__9_0.distcp").write_bytes(buffer.getvalue())
    change_metadata(folder, redirect)


def cause_of(error: CheckpointException) -> str:
    """What DCP has wrapped; the manager unwraps it for the user."""
    cause = error.failures[0][0]
    assert isinstance(cause, CheckpointError)
    return str(cause)


def test_a_hostile_chunk_is_refused_without_running(folder: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    shard_holding(folder, bomb)
    with pytest.raises(CheckpointException) as caught:
        load({"layers.0.w": torch.zeros(5, 3)}, SafeReader(folder))
    assert cause_of(caught.value) == "step-5/__9_0.distcp cannot be read (UnpicklingError)"
    assert not bomb.path.exists()


def test_a_chunk_that_is_no_tensor_is_refused(folder: Path) -> None:
    shard_holding(folder, {"a": torch.zeros(5, 3)})
    with pytest.raises(CheckpointException) as caught:
        load({"layers.0.w": torch.zeros(5, 3)}, SafeReader(folder))
    assert cause_of(caught.value) == "step-5/__9_0.distcp holds a dict where a tensor should be"


def test_byte_entries_are_not_read(tmp_path: Path) -> None:
    """Of another program's folder only the tensors are offered; DCP would unpickle the rest."""
    path = tmp_path / "step-1"
    bomb = Bomb(tmp_path / "exploded")
    dcp.save({"w": torch.ones(3), "extra": bomb}, checkpoint_id=path, no_dist=True)
    assert set(SafeReader(path).tensor_entries()) == {"w"}
    wanted = {"w": torch.zeros(3)}
    load(wanted, SafeReader(path))
    assert torch.equal(wanted["w"], torch.ones(3))
    with pytest.raises(CheckpointException) as caught:
        load({"extra": None}, SafeReader(path))
    assert cause_of(caught.value) == "extra is not stored as a tensor"
    assert not bomb.path.exists()
