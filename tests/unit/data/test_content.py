"""Hashes of files: remembered when that is safe, and never in place of what a file holds."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from titan_growth.data import content
from titan_growth.data.content import UNREADABLE, ContentHashes, MarkedFile, Trust, marked
from titan_growth.tools.errors import DataError
from titan_growth.tools.sealed import sealed

Digest = Callable[[object, object], str]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, and times that are taken for old at once."""
    names: list[str] = []
    plain = content._digest

    def counted(stream: object, file: content.Markable) -> str:
        names.append(file.name)
        return plain(stream, file)

    monkeypatch.setattr(content, "_digest", counted)
    monkeypatch.setattr(content, "_FRESH_NS", 0)
    return names


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text(name * 3)
    return folder


def files_of(folder: Path) -> list[MarkedFile]:
    return [marked(path, path.name) for path in sorted(folder.iterdir())]


def hashes_of(folder: Path, cache: Path, trust: Trust = Trust.REMEMBERED) -> list[str]:
    return ContentHashes(cache, trust).of(str(folder), files_of(folder))


def expected(*texts: str) -> list[str]:
    return [sha256(text.encode()).hexdigest() for text in texts]


def set_text(path: Path, text: str) -> None:
    """Another content under the same inode, size and times, but for the ctime."""
    status = path.stat()
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def test_a_second_start_reads_nothing(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    assert hashes_of(corpus, tmp_path) == expected("aaa", "bbb", "ccc")
    assert sorted(reads) == ["a", "b", "c"]
    assert hashes_of(corpus, tmp_path) == expected("aaa", "bbb", "ccc")
    assert len(reads) == 3


def test_what_changed_is_read_again_and_only_that(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    hashes_of(corpus, tmp_path)
    set_text(corpus / "b", "bbx")
    (corpus / "d").write_text("")
    reads.clear()
    assert hashes_of(corpus, tmp_path) == expected("aaa", "bbx", "ccc", "")
    assert sorted(reads) == ["b", "d"]


def test_equal_names_sizes_and_times_are_told_apart(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    set_text(other / "a", "xxx")
    assert hashes_of(corpus, tmp_path) != hashes_of(other, tmp_path)
    moved = corpus.rename(tmp_path / "moved")
    assert hashes_of(moved, tmp_path) == expected("aaa", "bbb", "ccc")
    other.rename(corpus)  # where the first one was
    assert hashes_of(corpus, tmp_path) == expected("xxx", "bbb", "ccc")


def test_a_fresh_file_is_not_remembered(corpus: Path, tmp_path: Path) -> None:
    hashes_of(corpus, tmp_path)
    assert not list(tmp_path.glob("hashes/*.json"))
    hashes = ContentHashes(tmp_path)
    hashes.of(str(corpus), files_of(corpus))
    assert not hashes.took_on_trust


@pytest.mark.parametrize("trust", [Trust.VERSIONS, Trust.NOTHING])
def test_a_change_under_the_same_mark_is_found_when_nothing_is_trusted(
    corpus: Path, tmp_path: Path, reads: list[str], trust: Trust, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_of(corpus)
    before = ContentHashes(tmp_path).of(str(corpus), files)
    table = next(tmp_path.glob("hashes/*.json"))
    kept = json.loads(table.read_bytes())
    set_text(corpus / "a", "xxx")
    # As if not even the ctime had changed: what is remembered bears the new marks.
    for file in files_of(corpus):
        kept["files"][file.name][1] = file.mark
    kept.pop("sha256")
    table.write_text(sealed(kept))
    trusting = ContentHashes(tmp_path)
    assert trusting.of(str(corpus), files_of(corpus)) == before
    assert trusting.took_on_trust
    renewed = trusting.renewed() if trust is Trust.VERSIONS else ContentHashes(tmp_path, trust)
    assert renewed.of(str(corpus), files_of(corpus)) == expected("xxx", "bbb", "ccc")
    assert [record.message for record in caplog.records] == [
        f"{corpus}: other content than before under the same size and times: a"
    ]
    assert hashes_of(corpus, tmp_path) == expected("xxx", "bbb", "ccc")


def test_versions_of_a_store_need_no_second_reading(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    files = [MarkedFile(file.path, file.name, 3, file.mark, is_versioned=file.name != "c") for file in files_of(corpus)]
    ContentHashes(tmp_path).of("base", files)
    reads.clear()
    ContentHashes(tmp_path).renewed().of("base", files)
    assert reads == ["c"]
    ContentHashes(tmp_path, Trust.NOTHING).renewed().of("base", files)
    assert sorted(reads) == ["a", "b", "c", "c"]


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "emptied": lambda text: "",
    "flipped": lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
    "entry": lambda text: text.replace(expected("bbb")[0], expected("xxx")[0]),
    "another shape": lambda text: "[1]",
    "another base": lambda text: text.replace('"base": "', '"base": "/elsewhere', 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_said_and_made_again(
    corpus: Path, tmp_path: Path, reads: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = hashes_of(corpus, tmp_path)
    table = next(tmp_path.glob("hashes/*.json"))
    table.write_text(DAMAGE[damage](table.read_text()))
    reads.clear()
    assert hashes_of(corpus, tmp_path) == before
    assert len(reads) == 3
    assert "so the files of" in caplog.text
    caplog.clear()
    assert hashes_of(corpus, tmp_path) == before
    assert len(reads) == 3
    assert not caplog.records


def test_a_cache_that_cannot_be_written_costs_only_time(
    corpus: Path, tmp_path: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hashes").write_text("a file, where a folder belongs")
    assert hashes_of(corpus, tmp_path) == hashes_of(corpus, tmp_path) == expected("aaa", "bbb", "ccc")
    assert len(reads) == 6
    assert "cannot be remembered" in caplog.text


def test_files_that_change_meanwhile_or_cannot_be_read(corpus: Path, tmp_path: Path) -> None:
    files = files_of(corpus)
    (corpus / "a").write_text("longer")
    with pytest.raises(DataError, match=r"corpus/a: it changed while it was read\. Start again"):
        ContentHashes(tmp_path).of(str(corpus), files)
    (corpus / "a").unlink()
    with pytest.raises(DataError, match=r"corpus/a: does not exist"):
        ContentHashes(tmp_path).of(str(corpus), files)
    found = ContentHashes(tmp_path).of(str(corpus), files, skip_unreadable=True)
    assert found == [UNREADABLE, *expected("bbb", "ccc")]


def _hash_in_process(folder: str, cache: str, barrier: object, results: object) -> None:
    content._FRESH_NS = 0
    lines: list[str] = []
    content.logger.addHandler(handler := logging.StreamHandler(_Lines(lines)))
    plain, num_read = content._digest, 0

    def counted(stream: object, file: content.Markable) -> str:
        nonlocal num_read
        num_read += 1
        return plain(stream, file)

    content._digest = counted
    barrier.wait()  # type: ignore[attr-defined]
    found = hashes_of(Path(folder), Path(cache))
    content.logger.removeHandler(handler)
    results.put((found, num_read, lines))  # type: ignore[attr-defined]


class _Lines:
    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def write(self, text: str) -> None:
        self._lines.append(text)

    def flush(self) -> None:
        """Nothing is kept."""


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(50):
        (folder / f"{number}.txt").write_bytes(os.urandom(100_000))
    yield folder
    shutil.rmtree(folder)


def test_of_several_processes_one_reads(large: Path, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(4), fork.Queue()
    processes = [
        fork.Process(target=_hash_in_process, args=(str(large), str(tmp_path), barrier, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(num_read for _, num_read, _ in found) == [0, 0, 0, 50]
    assert all(
        hashes == [sha256(file.path.read_bytes()).hexdigest() for file in files_of(large)] for hashes, *_ in found
    )
    assert not any(lines for *_, lines in found)
