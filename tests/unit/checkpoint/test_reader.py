"""Reading DCP folders: nothing in them is executed, chunks are read once, other names and shards are served."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorProperties

from titan_growth.checkpoint.reader import SafeReader
from titan_growth.tools.errors import CheckpointError

MemoryFormat = metadata._MEM_FORMAT_ENCODING

STORED = {
    "tok.weight": torch.arange(12.0).view(4, 3),
    "layers.0.w": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "layers.1.w": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
    "optimizer.state.layers.0.w.exp_avg": torch.full((5, 3), 0.5),
    "optimizer.state.layers.1.w.exp_avg": torch.full((5, 3), 1.5),
    "step": torch.tensor(7.0),
    "half": torch.arange(6).to(torch.bfloat16),
}


class Bomb:
    """Makes a folder when it is unpickled."""

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


def both_names(name: str) -> list[str]:
    """Serves each stored tensor under its own name and under a second one."""
    return [name, f"copy.{name}"]


def test_a_chunk_that_feeds_two_tensors_is_read_once(folder: Path) -> None:
    wanted = {shown: torch.zeros(5, 3) for name in STORED if "layers" in name for shown in both_names(name)}
    reader = SafeReader(folder, both_names)
    load(wanted, reader)
    assert all(torch.equal(tensor, STORED[name.removeprefix("copy.")]) for name, tensor in wanted.items())
    assert reader.num_chunks_read == len(wanted) / 2
    once = SafeReader(folder)
    load({name: torch.zeros(5, 3) for name in STORED if "layers" in name}, once)
    assert reader.num_bytes_read == once.num_bytes_read > 0


def test_the_entries_under_other_names(folder: Path) -> None:
    entries = SafeReader(folder, both_names).tensor_entries()
    assert entries.keys() == {shown for name in STORED for shown in both_names(name)}
    assert entries["copy.half"].properties.dtype == torch.bfloat16


def test_the_chunks_of_a_folder(folder: Path) -> None:
    reader = SafeReader(folder)
    chunks = reader.chunks()
    assert chunks.keys() == STORED.keys()
    for name, tensor in STORED.items():
        (chunk,) = chunks[name]
        assert (chunk.offsets, chunk.sizes, chunk.dtype) == ((0,) * tensor.dim(), tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read_chunk(chunk), tensor)
    with pytest.raises(CheckpointError, match=r"step-5 refused: .* does not hold layers\.0\.w as the metadata says"):
        reader.read_chunk(dataclasses.replace(chunks["layers.0.w"][0], sizes=(5, 4)))


def rewrite_properties(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Pickles the metadata again with other states of `TensorProperties`."""
    state_of = TensorProperties.__getstate__
    with monkeypatch.context() as patch:
        patch.setattr(TensorProperties, "__getstate__", lambda properties: change(state_of(properties)))
        change_metadata(folder, lambda _metadata: None)


PROPERTIES = {
    "torch 2.13": lambda state: state[:5],
    "torch 2.15": lambda state: (*state[:5], (3, 1)),
    "torch 2.15 without strides": lambda state: (*state[:5], None),
}


@pytest.mark.parametrize("layout", PROPERTIES)
def test_metadata_of_other_releases_of_torch(layout: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite_properties(folder, monkeypatch, PROPERTIES[layout])
    wanted = {name: torch.full_like(tensor, 99) for name, tensor in STORED.items()}
    load(wanted, SafeReader(folder))
    assert all(torch.equal(wanted[name], STORED[name]) for name in STORED)


def test_metadata_of_pythons_that_pickle_enums_by_getattr(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.0 to 3.11.3; Debian 12 ships one of them."""
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFormat, "__reduce_ex__", lambda member, _protocol: (getattr, (MemoryFormat, member.name)))
        change_metadata(folder, lambda _metadata: None)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    wanted = {name: torch.full_like(tensor, 99) for name, tensor in STORED.items()}
    load(wanted, SafeReader(folder))
    assert all(torch.equal(wanted[name], STORED[name]) for name in STORED)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state[:4],
        lambda state: (*state[:5], (3, 1), None),
        lambda state: list(state),
        lambda state: ("torch.float32", *state[1:5], (3, 1)),
    ],
    ids=["too few", "too many", "a list", "no type"],
)
def test_other_properties_are_refused(change: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite_properties(folder, monkeypatch, change)
    with pytest.raises(CheckpointError, match=r"^step-5 refused: its metadata does not say which type \S+ has$"):
        SafeReader(folder).read_metadata()


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
    "name", ["builtins\neval", "builtins\nsetattr", "os\nsystem", "torch\nload", "torch.serialization\nload",
             "torch\nSize.__class__", "pathlib\nPath.home", "functools\npartial"]
)  # fmt: skip
def test_other_globals_are_refused(name: str, folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(CheckpointError, match="step-5 refused: its metadata asks for"):
        SafeReader(folder).read_metadata()


@pytest.mark.parametrize(
    "arguments",
    [
        (MemoryFormat, 1),
        (MemoryFormat,),
        (MemoryFormat, "__class__", 0),
        (torch.Size, "__subclasses__"),
        (torch.float32, "to_complex"),
        ("text", "upper"),
    ],
    ids=str,
)
def test_any_other_getattr_is_refused(arguments: tuple[Any, ...], folder: Path) -> None:
    class Asks:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, arguments

    def plant(metadata: Any) -> None:
        metadata.planner_data = {"x": Asks()}

    change_metadata(folder, plant)
    with pytest.raises(CheckpointError, match=r"^step-5 refused: its metadata asks for builtins\.getattr$"):
        SafeReader(folder).read_metadata()


def test_getattr_alone_is_no_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"cbuiltins\ngetattr\n.")
    with pytest.raises(CheckpointError, match="step-5 refused: its metadata"):
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
    with pytest.raises(CheckpointError, match="step-5 refused: its metadata names the file"):
        SafeReader(folder).read_metadata()


@pytest.mark.parametrize(("field", "value"), [("storage_data", None), ("storage_data", {"a": 3}),
                                              ("storage_data", {3: None}), ("state_dict_metadata", None),
                                              ("state_dict_metadata", [1])])  # fmt: skip
def test_metadata_of_the_wrong_shape_is_one_line(field: str, value: object, folder: Path) -> None:
    change_metadata(folder, lambda metadata: setattr(metadata, field, value))
    with pytest.raises(CheckpointError, match=r"^step-5 refused: [^\n]+$"):
        SafeReader(folder, lambda name: [name, name]).tensor_entries()


def shard_holding(folder: Path, value: object) -> None:
    """Stores something else in place of layers.0.w."""
    buffer = io.BytesIO()
    torch.save(value, buffer)

    def redirect(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "layers.0.w":
                info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(buffer.getvalue())

    (folder / "__9_0.distcp").write_bytes(buffer.getvalue())
    change_metadata(folder, redirect)


def cause_of(error: CheckpointException) -> str:
    """The error that DCP wrapped; the manager unwraps it for the user."""
    cause = error.failures[0][0]
    assert isinstance(cause, CheckpointError)
    return str(cause)


def test_a_hostile_chunk_is_refused_without_running(folder: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    shard_holding(folder, bomb)
    with pytest.raises(CheckpointException) as caught:
        load({"layers.0.w": torch.zeros(5, 3)}, SafeReader(folder))
    assert cause_of(caught.value) == ("step-5 refused: __9_0.distcp, where layers.0.w should be, asks for posix.mkdir")
    assert not bomb.path.exists()


def test_a_chunk_that_is_not_a_tensor_is_refused(folder: Path) -> None:
    shard_holding(folder, {"a": torch.zeros(5, 3)})
    with pytest.raises(CheckpointException) as caught:
        load({"layers.0.w": torch.zeros(5, 3)}, SafeReader(folder))
    assert cause_of(caught.value) == (
        "step-5 refused: __9_0.distcp, where layers.0.w should be, holds a dict where a tensor should be"
    )


def test_byte_entries_are_not_read(tmp_path: Path) -> None:
    """Only the tensors of a foreign folder are served; DCP would unpickle the rest."""
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
