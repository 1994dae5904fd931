"""Corpora: what is read, in which order, and what is said when it cannot be."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import titan_growth
from titan_growth.data.content import ContentHashes
from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.listing import find_files
from titan_growth.tools.errors import DataError

ROOT = str(Path(titan_growth.__file__).parents[1])


def read(
    path: Path | str, dataset: str = "stdlib", text_key: str = "text", start: int = 0, split: str = "train"
) -> list:
    spec = CorpusSpec(dataset, str(path), text_key=text_key, split=split)
    return list(open_corpus(spec).documents(start))


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with every kind of file, and what is to be skipped: another extension, hidden files."""
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    (folder / "b.jsonl").write_text(lines({"text": "b0", "x": 1}) + "\n" + lines({"text": "b1 é"}))
    (folder / "c.json.gz").write_bytes(gzip.compress(lines({"text": "c0"}, {"text": "c1"}).encode()))
    compressor = zstandard.ZstdCompressor()
    frames = [compressor.compress(lines({"text": text}).encode()) for text in ("d0", "d1")]
    (folder / "d.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(pa.table({"text": ["e0", "e1", "e2"], "n": [1, 2, 3]}), folder / "e.parquet", row_group_size=2)
    (folder / "f.txt.gz").write_bytes(gzip.compress(b"f"))
    (folder / "g.txt.zst").write_bytes(compressor.compress(b"g"))
    (folder / "g.txt.zz.bz2").write_bytes(b"no kind")
    (folder / "g1.jsonl.bz2").write_bytes(bz2.compress(lines({"text": "g1"}).encode()))
    (folder / "g2.txt.XZ").write_bytes(lzma.compress(b"g2"))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "sub" / "h.md").write_text("h")
    return folder


EXPECTED = ["one\r\ntwo", "b0", "b1 é", "c0", "c1", "d0", "d1", "e0", "e1", "e2", "f", "g", "g1", "g2", "h"]


def test_folder_of_all_kinds_is_read_in_order(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(mixed) == EXPECTED
    assert not caplog.records
    left_out = open_corpus(CorpusSpec("c4", str(mixed))).account().left_out
    assert {reason: entry.names for reason, entry in left_out.items()} == {
        "hidden": [".git/"],
        "of no known kind": ["g.txt.zz.bz2", "picture.png"],
    }


@pytest.mark.parametrize("start", range(len(EXPECTED) + 1))
def test_reading_resumes_at_any_document(mixed: Path, start: int) -> None:
    assert read(mixed, start=start) == EXPECTED[start:]


def test_file_and_glob_and_forced_kind(mixed: Path, tmp_path: Path) -> None:
    assert read(mixed / "b.jsonl", "c4") == ["b0", "b1 é"]
    assert read(f"{mixed}/**/*.[tm][xd]*", "c4") == ["one\r\ntwo", "f", "g", "g2", "h"]
    assert read(mixed, "parquet") == ["e0", "e1", "e2"]
    (tmp_path / "records.log").write_text(lines({"body": "x"}))
    assert read(tmp_path / "records.log", "json", "body") == ["x"]
    assert read(tmp_path / "records.log", "text") == ['{"body": "x"}\n']


def fingerprint(cache: Path, path: Path | None, key: str = "text", split: str = "train") -> str:
    spec = CorpusSpec("c4", str(path), text_key=key, split=split) if path else CorpusSpec()
    return open_corpus(spec).fingerprint(ContentHashes(cache))


def test_fingerprint_follows_the_content_and_neither_place_nor_time(mixed: Path, tmp_path: Path) -> None:
    before = fingerprint(tmp_path, mixed)
    moved = mixed.rename(tmp_path / "moved")
    os.utime(moved / "a.txt", ns=(1, 1))
    assert fingerprint(tmp_path, moved) == before
    assert fingerprint(tmp_path, moved, "body") != before
    status = (moved / "a.txt").stat()
    (moved / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwx")
    os.utime(moved / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (moved / "a.txt").stat().st_size == status.st_size
    changed = fingerprint(tmp_path, moved)
    assert changed != before
    (moved / "a.txt").rename(moved / "aa.txt")
    assert fingerprint(tmp_path, moved) not in (before, changed)


def test_stdlib_is_real_text_without_tests() -> None:
    corpus = open_corpus(CorpusSpec())
    documents = list(corpus.documents())
    assert 5e6 < sum(map(len, documents)) <= corpus.num_bytes < 20e6  # type: ignore[operator]
    assert any("class OrderedDict(dict)" in text for text in documents)
    assert not any("class TestBaseException" in text for text in documents)
    assert list(corpus.documents(start=700)) == documents[700:]


def test_stdlib_leaves_unreadable_files_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test").mkdir()
    for name, content in {"a.py": b"a", "b.py": b"\xff", "c.py": b"c", "test/d.py": b"d"}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = open_corpus(CorpusSpec())
    account = corpus.account()
    assert ["".join(parts) for parts in corpus.document_parts(0, account)] == ["a", "c"]
    assert account.left_out["unreadable or not UTF-8"].names == ["b.py"]
    before = fingerprint(tmp_path, None)
    assert fingerprint(tmp_path, None) == before
    (tmp_path / "c.py").write_bytes(b"d")
    assert fingerprint(tmp_path, None) != before


def test_utf8_across_chunk_borders(tmp_path: Path) -> None:
    text = "x" + "é漢" * 700_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("num_before", [0, 5, (1 << 20) - 1, (1 << 20) + 7])
def test_bad_utf8_is_reported_with_its_offset(tmp_path: Path, num_before: int) -> None:
    # 0xe2 0x82 begins a character of three bytes; with num_before = 2**20 - 1 a chunk ends within it.
    (tmp_path / "a.txt").write_bytes(b"a" * num_before + b"\xe2\x82a")
    with pytest.raises(DataError, match=rf"a\.txt: byte offset {num_before} is not valid UTF-8"):
        read(tmp_path)


BROKEN = {
    "truncated.txt.gz": (
        gzip.compress(os.urandom(5000))[:-900],
        r"truncated\.txt\.gz: the compressed data is truncated",
    ),
    "truncated.txt.bz2": (
        bz2.compress(os.urandom(5000))[:-900],
        r"truncated\.txt\.bz2: the compressed data is truncated",
    ),
    "truncated.txt.xz": (
        lzma.compress(os.urandom(5000))[:-900],
        r"truncated\.txt\.xz: the compressed data is truncated",
    ),
    "not.txt.bz2": (b"plain", r"not\.txt\.bz2: the compressed data is truncated or damaged \(Invalid data stream"),
    "not.txt.xz": (b"plain", r"not\.txt\.xz: the compressed data is truncated or damaged \(Input format"),
    "not.txt.gz": (b"plain", r"not\.txt\.gz: the compressed data is truncated or damaged \(Not a gzipped file"),
    "cut.txt.zst": (zstandard.compress(os.urandom(5000))[:-900], r"cut\.txt\.zst: the compressed data is truncated"),
    "not.txt.zst": (b"plain text", r"not\.txt\.zst: the compressed data is truncated or damaged"),
    "bad.parquet": (b"PAR1" + b"x" * 50, r"bad\.parquet: truncated or not a parquet file"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: broken JSON at column"),
    "nokey.jsonl": (
        b'{"body": "a", "id": 1}\n',
        r"nokey\.jsonl:1: no field 'text'; it has: body, id\. Set data\.text_key",
    ),
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}\n', r"number\.jsonl:2: the field 'text' is int, not a string"),
    "null.jsonl": (b'{"text": null}\n', r"null\.jsonl:1: the field 'text' is null, not a string"),
    "list.jsonl": (b'{"text": "a"}\n["a"]', r"list\.jsonl:2: a list instead of an object"),
    "cut.json": (b'[{"text": "a"}, {"text": "b"', r"cut\.json: element 2: broken JSON"),
    "strings.json": (b'["a", "b"]', r"strings\.json: element 1: str instead of an object"),
    "joined.json": (b'[{"text": "a"} {"text": "b"}]', r"joined\.json: element 1: broken JSON \(no comma follows\)"),
    "more.json": (b'[{"text": "a"}] [', r"more\.json: text follows the end of the JSON array"),
    "deep.json": (b'[{"text":' + b"[" * 200_000, r"deep\.json: element 1: JSON nested too deeply"),
    "empty.tar": (b"", r"empty\.tar: empty \(0 bytes"),
    "not.tar": (b"plain text" * 200, r"not\.tar: the archive is truncated or damaged"),
    "half.jsonl": (b'{"text": "a\\ud800"}', r"half\.jsonl:1: .* lone surrogate at character 1"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', r"latin\.jsonl:2: byte offset 24 is not valid UTF-8"),
    "deep.jsonl": (b'{"text":' + b"[" * 200_000, r"deep\.jsonl:1: JSON nested too deeply"),
    "empty.txt": (b"", r"empty\.txt: empty \(0 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_reported_with_its_position(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    if b"\\ud800" not in content and not name.startswith("empty."):
        with pytest.raises(DataError, match=message):
            read(tmp_path)


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "s": ["a", None], "d": pa.array(["x", "y"], pa.large_string())}), path)
    with pytest.raises(DataError, match=r"a\.parquet: no field 'text'; it has: n, s, d\. Set data\.text_key"):
        read(path)
    with pytest.raises(DataError, match=r"a\.parquet: the column 'n' holds int64, not strings"):
        read(path, text_key="n")
    with pytest.raises(DataError, match=r"a\.parquet: row 1: the column 's' is null"):
        read(path, text_key="s")
    assert read(path, text_key="d") == ["x", "y"]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: truncated or not a parquet file"):
        read(path, text_key="d")


def test_missing_and_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: does not exist\. Set dataset_path"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"the glob matches no file"):
        read(f"{tmp_path}/*.txt")
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no file of a known kind \(of no known kind: x\.png\)"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"dataset 'json': needs files to read\. Set dataset_path"):
        open_corpus(CorpusSpec("json"))


@pytest.fixture
def locked_file() -> Iterator[Path]:
    """A file that this process may not read, also where the tests run as root."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="titan_growth_test_"))
    (folder / "secret.txt").write_text("secret")
    (folder / "secret.txt").chmod(0)
    folder.chmod(0o755)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield folder / "secret.txt"
    if was_root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_no_permission(locked_file: Path) -> None:
    with pytest.raises(DataError, match=r"secret\.txt: no permission to read it"):
        read(locked_file)


def test_saved_dataset_folder(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = [f"row {number}" for number in range(600)]
    table = datasets.Dataset.from_dict({"text": rows, "n": list(range(600))})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "tail": table.select([1])}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "one") == rows
    assert read(tmp_path / "one", start=300) == rows[300:]
    assert read(tmp_path / "dict", split="tail") == ["row 1"]
    before = fingerprint(tmp_path, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    assert fingerprint(tmp_path, tmp_path / "other") == before
    datasets.Dataset.from_dict({"text": rows[::-1], "n": list(range(600))}).save_to_disk(tmp_path / "reversed")
    # The library's own fingerprint is in state.json, which stays.
    shutil.copy(tmp_path / "reversed" / "data-00000-of-00001.arrow", tmp_path / "other")
    assert fingerprint(tmp_path, tmp_path / "other") != before
    with pytest.raises(DataError, match=r"no split 'test'; it has: train, tail"):
        read(tmp_path / "dict", split="test")
    with pytest.raises(DataError, match=r"no field 'body'; it has: text, n"):
        read(tmp_path / "one", text_key="body")
    with pytest.raises(DataError, match=r"the field 'n' is int64, not a string"):
        read(tmp_path / "one", text_key="n")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"one: damaged saved dataset"):
        read(tmp_path / "one")


def test_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    program = (
        "from titan_growth.data.corpora import CorpusSpec, open_corpus\n"
        "from titan_growth.tools.errors import DataError\n"
        "try:\n    open_corpus(CorpusSpec('nobody/nothing', subset='en'))\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("dataset 'nobody/nothing': cannot be loaded from the Hugging Face hub, subset 'en'")
    assert 'or use dataset = "stdlib"' in done.stdout


def test_importing_corpora_needs_no_heavy_library() -> None:
    program = (
        "import sys, titan_growth.data.corpora as corpora; corpora.CorpusSpec()\n"
        "print([name for name in ('torch', 'datasets', 'numpy', 'tokenizers', 'sentencepiece') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_files_are_sorted_by_relative_name(mixed: Path) -> None:
    names = [file.name for file in find_files(mixed, None).files]
    assert names == sorted(names)
    assert names[-1] == "sub/h.md"
