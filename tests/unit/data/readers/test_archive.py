"""Tar archives and webdataset shards."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import zstandard

from tests.unit.data.readers.reading import account_of, refusal_of, texts_of
from titan_growth.data.readers import archive


def tar(members: Mapping[str, bytes], file_format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of these members, in their order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=file_format) as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return file.getvalue()


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


MIXED = {
    "folder/a.txt": "\ufeffa é".encode(),
    "folder/b.jsonl": line("b0") + line("b1"),
    f"{'long/' * 50}é.csv": b"text\nc0\nc1\n",
    "d.jsonl.gz": gzip.compress(line("d0")),
    "e.json": json.dumps([{"text": "e0"}, {"text": "e1"}]).encode(),
    "empty.txt": b"",
    "f.txt.zst": zstandard.compress(b"f"),
}
TEXTS = ["a é", "b0", "b1", "c0", "c1", "d0", "e0", "e1", "", "f"]


@pytest.mark.parametrize("file_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_as_files(file_format: int, tmp_path: Path) -> None:
    content = tar(MIXED, file_format)
    for name, packed in {
        "a.tar": content,
        "a.tar.gz": gzip.compress(content),
        "a.tgz": gzip.compress(content),
        "a.tar.zst": zstandard.compress(content),
    }.items():
        (tmp_path / name).write_bytes(packed)
        for start in range(len(TEXTS) + 1):
            assert texts_of(tmp_path / name, start=start) == TEXTS[start:]


def test_archives_may_be_joined(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"a.txt": b"a"}) + tar({"b.txt": b"b"}))
    assert texts_of(tmp_path / "a.tar") == ["a", "b"]


def test_a_sample_of_webdataset_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    members = {
        "0001.jpg": b"\xff\xd8",
        "0001.json": line("metadata"),
        "0001.txt": b"caption 1",
        "0002.cls": b"7",
        "0002.json": line("only json"),
        "0003.txt": b"caption 3",
        "0003.json": line("metadata"),
        "0004.json": line("last"),
        "._0004.txt": b"of a Mac",
    }
    path.write_bytes(tar(members))
    expected = ["caption 1", "only json", "caption 3", "last"]
    for start in range(5):
        assert texts_of(path, start=start) == expected[start:]
    left_out = {reason: entry.names for reason, entry in account_of(path).left_out.items()}
    assert left_out == {
        "JSON beside a text of the same sample": ["shard.tar: 0001.json", "shard.tar: 0003.json"],
        "members of archives that hold no text": [
            "shard.tar: 0001.jpg",
            "shard.tar: 0002.cls",
            "shard.tar: ._0004.txt",
        ],
    }


def test_files_that_agree_up_to_the_first_dot_are_all_read(tmp_path: Path) -> None:
    """They are one sample by their names. Without a text, none of its JSON is left out; with one, all is."""
    path = tmp_path / "a.tar"
    parts = {f"part.{number}.json": line(f"p{number}") for number in range(3)}
    path.write_bytes(tar({**parts, "other.txt": b"other"}))
    for start in range(5):
        assert texts_of(path, start=start) == ["p0", "p1", "p2", "other"][start:]
    path.write_bytes(tar({**parts, "part.txt": b"text", "part.3.json": line("p3")}))
    assert texts_of(path) == ["text"]
    assert account_of(path).left_out["JSON beside a text of the same sample"].count == 4


def test_many_files_of_one_sample_are_not_all_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LONGEST_RECORD_BYTES", 50)
    (tmp_path / "a.tar").write_bytes(tar({f"part.{number}.json": line(f"p{number}") for number in range(9)}))
    assert texts_of(tmp_path / "a.tar") == [f"p{number}" for number in range(9)]


def test_neither_files_of_a_mac_nor_compression_part_a_sample(tmp_path: Path) -> None:
    members = {"._1.json": b"of a Mac", "1.json": line("metadata"), "._1.txt": b"of a Mac", "1.txt": b"caption 1"}
    members |= {
        "2.json.gz": gzip.compress(line("metadata")),
        "2.txt": b"caption 2",
        "3.JSON.gz": gzip.compress(line("3")),
    }
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert texts_of(tmp_path / "a.tar") == ["caption 1", "caption 2", "3"]


def test_errors_name_the_member(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar({"a.txt": b"fine", "b/c.jsonl": line("fine") + b"{"}))
    assert refusal_of(path).startswith("a.tar: b/c.jsonl:2: broken JSON at column 2")
    path.write_bytes(tar({"a.txt": b"fine", "b.txt": b"caf\xe9"}))
    assert refusal_of(path).startswith("a.tar: b.txt: byte offset 3 is not valid UTF-8")


def test_every_cut_and_every_damaged_header_is_noticed(tmp_path: Path) -> None:
    """The library would take both for the end of the archive."""
    path = tmp_path / "a.tar"
    content = tar({"a.txt": b"a" * 700, "b.jsonl": line("b"), "c.png": b"c" * 600})
    end = len(content.rstrip(b"\0"))
    for length in [*range(100, end, 97), *range(512, end + 512, 512)]:
        path.write_bytes(content[:length])
        message = refusal_of(path)
        assert "truncated" in message or "unexpected end of data" in message, (length, message)
    for header in range(0, end, 512):
        if content[header + 257 : header + 262] == b"ustar":
            path.write_bytes(content[: header + 150] + b"\xff" + content[header + 151 :])
            assert "the archive is truncated or damaged" in refusal_of(path)


def test_a_header_that_claims_gigabytes(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert "the archive is damaged (a header of 8,589,934,592 bytes)" in refusal_of(tmp_path / "a.tar")
