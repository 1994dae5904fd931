"""Ways to make a checkpoint that attacks who reads it. Each takes a step folder, and a bomb to hide in it."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from titan_growth.checkpoint.folder import file_entry, open_step, write_manifest
from titan_growth.tools.errors import CheckpointError

NAME = "layers.0.attention.wq.weight"
"""A tensor of the checkpoint; any would do."""


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


Case = Callable[[Path, Bomb], None]
CASES: dict[str, Case] = {}
NOT_FOR_A_START: set[str] = set()
"""Cases in what is not read when a new run starts from the weights: recipe, lineage, random states."""


def case(name: str, *, start: bool = True) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        CASES[name] = function
        if not start:
            NOT_FOR_A_START.add(name)
        return function

    return register


def signed(folder: Path) -> None:
    """Makes the manifest of a folder fit its files, as a stranger can."""
    try:
        step = open_step(folder)
    except CheckpointError:
        return  # the manifest itself is the attack
    assert step is not None
    plain = [
        path for path in folder.iterdir() if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30
    ]
    entries = {path.name: file_entry(path) for path in plain if path.name in step.manifest.files}
    write_manifest(folder, replace(step.manifest, files={**step.manifest.files, **entries}))


# ---- the metadata as a program ---------------------------------------------------------------------------------------


def metadata_is(step: Path, program: bytes) -> None:
    (step / ".metadata").write_bytes(program)


@case("a pickle as metadata")
def _(step: Path, bomb: Bomb) -> None:
    metadata_is(step, pickle.dumps(bomb))


@case("a pickle of protocol 0 as metadata")
def _(step: Path, bomb: Bomb) -> None:
    metadata_is(step, pickle.dumps(bomb, protocol=0))


@case("a pickle in the planner's data")
def _(step: Path, bomb: Bomb) -> None:
    with_metadata(step, lambda metadata: setattr(metadata, "planner_data", {"x": bomb}))


@case("attributes set on the admitted classes")
def _(step: Path, bomb: Bomb) -> None:
    state = pickle.dumps((None, {"__setstate__": print}), protocol=2)[2:-1].replace(b"c__builtin__\nprint\n", b"N")
    metadata_is(step, b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n" + state + b"b.")


def _program(name: str, program: bytes) -> None:
    case(name)(lambda step, bomb: metadata_is(step, program))


_program("a memo of gigabytes", b"\x80\x04Nr\xff\xff\xff\x7f.")
_program("a string of exabytes", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0fxx.")
_program("bytes of exabytes", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0fxx.")
_program("a frame of exabytes", b"\x80\x04\x95" + b"\xff" * 7 + b"\x0fN.")
_program("a number of a million bytes", b"\x80\x04\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6 + b".")
_program("nested a million times", b"\x80\x04" + b"(" * 10**6 + b".")
_program("nested lists", b"\x80\x04" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".")
_program("a key that takes forever to hash", b"\x80\x04})" + b"\x94" + b"h\x00\x86" + b"".join(
    b"\x94h" + bytes([index]) + b"\x86" for index in range(1, 60)) + b"Ns.")  # fmt: skip
_program(
    "tuples doubled sixty times", b"\x80\x04)" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60)) + b"."
)
_program("a global from a list", b"\x80\x04]]\x93.")
_program("cut off", b"\x80\x04\x95")
_program("empty", b"")
_program("a name with escape sequences", b"\x80\x02c\x1b[2J\x1b]0;pwned\x07\nx\rstep-4 is fine\n.")


# ---- the metadata as data --------------------------------------------------------------------------------------------


def with_metadata(step: Path, change: Callable[[Any], Any]) -> None:
    metadata = pickle.loads((step / ".metadata").read_bytes())
    change(metadata)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def stored(metadata: Any, name: str = NAME) -> Any:
    """The place of a tensor."""
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def _changed(name: str, change: Callable[[Any], Any]) -> None:
    case(name)(lambda step, bomb: with_metadata(step, change))


def _file(name: str, path: str) -> None:
    _changed(name, lambda metadata: setattr(stored(metadata), "relative_path", path))


_file("a file above the folder", "../step-2/__0_0.distcp")
_file("a file by its absolute path", "/etc/passwd")
_file("a file on another system's drive", "C:\\secret")
_file("a file name with a zero byte", "__0_0.distcp\0")
_file("a file name with escape sequences", "\x1b[31m__0_0.distcp\nstep-4 is fine")
_file("a device", "CON:")
_file("a file that is not there", "__7_0.distcp")
_file("a file name of a million letters", "x" * 10**6)


def _box(metadata: Any, size: tuple[int, ...]) -> None:
    entry = metadata.state_dict_metadata[NAME]
    entry.size, entry.chunks[0].sizes = torch.Size(size), torch.Size(size)


_changed("a tensor of 2^60 values", lambda metadata: _box(metadata, (2**30, 2**30)))
_changed("a tensor of 2^124 values", lambda metadata: _box(metadata, (2**62, 2**62)))
_changed("a negative size", lambda metadata: _box(metadata, (-16, -16)))
_changed("a tensor of a thousand dimensions", lambda metadata: _box(metadata, (1,) * 1000))
_changed("an offset beyond the file", lambda metadata: setattr(stored(metadata), "offset", 2**62))
_changed("a length beyond the file", lambda metadata: setattr(stored(metadata), "length", 2**62))
_changed("a negative offset", lambda metadata: setattr(stored(metadata), "offset", -5))
_changed("a length that is text", lambda metadata: setattr(stored(metadata), "length", "1" * 5000))
_changed("a number beyond all printing", lambda metadata: setattr(stored(metadata), "length", 10**5000))


@case("a list that contains itself")
def _(step: Path, bomb: Bomb) -> None:
    def change(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata[NAME].chunks
        chunks.append(chunks)

    with_metadata(step, change)


@case("metadata that contains itself")
def _(step: Path, bomb: Bomb) -> None:
    with_metadata(step, lambda metadata: metadata.state_dict_metadata.update({NAME: metadata}))


@case("two names for one entry")
def _(step: Path, bomb: Bomb) -> None:
    def change(metadata: Any) -> None:
        table = metadata.state_dict_metadata
        table.update({f"copy.{number}": table[NAME] for number in range(1000)})

    with_metadata(step, change)


@case("two tensors in the same bytes")
def _(step: Path, bomb: Bomb) -> None:
    def change(metadata: Any) -> None:
        stored(metadata).offset = stored(metadata, "layers.0.attention.wo.weight").offset

    with_metadata(step, change)


@case("a piece that is missing")
def _(step: Path, bomb: Bomb) -> None:
    with_metadata(step, lambda metadata: metadata.state_dict_metadata[NAME].chunks.clear())


@case("pieces that overlap and leave a gap")
def _(step: Path, bomb: Bomb) -> None:
    """Their sizes add up; what the gap would hold is whatever was in memory."""

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[NAME]
        chunk, rows = entry.chunks[0], entry.size[0]
        half = replace(chunk, sizes=torch.Size((rows // 2, entry.size[1])))
        entry.chunks[:] = [half, replace(half, offsets=torch.Size((1, 0)))]
        metadata.storage_data[MetadataIndex(NAME, half.offsets)] = stored(metadata)
        metadata.storage_data[MetadataIndex(NAME, (1, 0))] = replace(stored(metadata), offset=0, length=1)

    with_metadata(step, change)


@case("a tensor that is not listed")
def _(step: Path, bomb: Bomb) -> None:
    with_metadata(step, lambda metadata: metadata.state_dict_metadata.pop(NAME))


@case("a pickle in a byte entry")
def _(step: Path, bomb: Bomb) -> None:
    """DCP unpickles such entries without asking."""
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    shard = step / "__0_0.distcp"
    begin = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + buffer.getvalue())

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["extra"] = BytesStorageMetadata()
        place = replace(stored(metadata), offset=begin, length=len(buffer.getvalue()))
        metadata.storage_data[MetadataIndex("extra")] = place

    with_metadata(step, change)


# ---- archives --------------------------------------------------------------------------------------------------------


def archive_is(step: Path, content: bytes) -> None:
    """Puts an archive where a tensor should be."""
    (step / "__0_0.distcp").write_bytes((step / "__0_0.distcp").read_bytes() + content)
    size = (step / "__0_0.distcp").stat().st_size

    def change(metadata: Any) -> None:
        stored(metadata).offset, stored(metadata).length = size - len(content), len(content)

    with_metadata(step, change)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(program: bytes, values: bytes = b"", how: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", values)
    return buffer.getvalue()


def tensor_program(size: tuple[int, ...], stride: tuple[int, ...], length: int, offset: int = 0) -> bytes:
    """The pickle of a tensor that says of itself whatever it likes."""
    numbers = pickle.dumps((offset, size, stride), protocol=2)[2:-1]
    # (storage, offset, size, stride, False, OrderedDict()), the numbers taken from a tuple of their own.
    count = pickle.dumps(length, protocol=2)[2:-1]
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"
    body = numbers[: numbers.rindex(b"\x87")]
    return head + b"0X\3\0\0\0cpu" + count + b"tQ" + body + b"\x89ccollections\nOrderedDict\n)RtR."


def _archive(name: str, make: Callable[[Bomb], bytes]) -> None:
    case(name)(lambda step, bomb: archive_is(step, make(bomb)))


_archive("a pickle as a tensor", saved)
_archive("a pickle without an archive as a tensor", pickle.dumps)
_archive("a table where a tensor should be", lambda bomb: saved({"a": torch.zeros(16, 16)}))
_archive("an array of bytes of a terabyte", lambda bomb: zipped(
    b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."))  # fmt: skip
_archive("a compressed pickle of 64 MiB", lambda bomb: zipped(b"N" * 2**26, how=zipfile.ZIP_DEFLATED))
_archive("compressed values", lambda bomb: zipped(
    tensor_program((16, 16), (16, 1), 256), b"\0" * 2**24, zipfile.ZIP_DEFLATED))  # fmt: skip
_archive("one value as a terabyte", lambda bomb: zipped(tensor_program((2**20, 2**20), (0, 0), 1), b"\0" * 4))
_archive("one value as many", lambda bomb: zipped(tensor_program((16, 16), (0, 0), 1), b"\0" * 4))
_archive("a storage of 2^60 values", lambda bomb: zipped(tensor_program((16, 16), (16, 1), 2**60), b"\0" * 1024))
_archive(
    "values before their storage", lambda bomb: zipped(tensor_program((16, 16), (16, 1), 256, 2**60), b"\0" * 1024)
)
_archive("a sparse tensor", lambda bomb: saved(torch.eye(16).to_sparse()))
_archive(
    "a tensor with hooks", lambda bomb: saved(torch.nn.Parameter(torch.eye(16))).replace(b"OrderedDict", b"defaultdict")
)
_archive("a directory of gigabytes", lambda bomb: saved(torch.eye(16))[:-98] + struct.pack(
    "<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**31, 0, 0))  # fmt: skip
_archive("a directory that points outside", lambda bomb: zipped(b"N.").replace(b"PK\1\2", b"PK\1\2" + b"\xff" * 40))
_archive("no archive", lambda bomb: b"\0" * 1000)
