"""Corpora and tokenizers that a URL names: read as from a disk, and refused in one line."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.recipes.bad_data import small_tokenizer
from tests.storage import PROTOCOL, BucketFileSystem, register
from tests.unit.data.checksums import assert_checksums
from titan_growth.data.account import Account
from titan_growth.data.content import ContentHashes
from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.preparation import prepare
from titan_growth.data.storage import cache_root
from titan_growth.data.tokenizers import BytesTokenizer, Tokenizer, TokenizerSpec, load_or_train
from titan_growth.tools.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:UPath 'bucket' filesystem not explicitly implemented")
register()

SCHEMES = ["file", "memory", PROTOCOL]
Put = Callable[[str, dict[str, bytes]], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TITAN_GROWTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _storage() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()
    BucketFileSystem.reset()


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Puts files into a folder of a storage and returns its URL."""

    def put_into(scheme: str, files: dict[str, bytes]) -> str:
        folder = f"{tmp_path}/stored" if scheme == "file" else "/stored/corpus"
        for name, content in files.items():
            path = f"{folder}/{name}"
            if scheme == "file":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content)
            elif scheme == "memory":
                fsspec.filesystem("memory").pipe(path, content)
            else:
                BucketFileSystem.objects[path.removeprefix("/")] = content
        return f"{scheme}://{folder.lstrip('/') if scheme == PROTOCOL else folder}"

    return put_into


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(*texts: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(texts), "n": list(range(len(texts)))}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


CORPUS = {
    "a.txt": "\ufeffone\r\ntwo".encode(),
    "b.jsonl": lines("b0", "b1 é", "b2" * 500),
    "c.json.gz": gzip.compress(lines("c0", "c1")),
    "d.jsonl.zst": zstandard.compress(lines("d0")) + zstandard.compress(lines("d1")),
    "e.parquet": parquet("e0", "e1", "e2"),
    "f.py.gz": gzip.compress(b"f"),
    "g.txt.zst": zstandard.compress(b"g"),
    "sub/h.md": b"h",
}
TEXTS = ["one\r\ntwo", "b0", "b1 é", "b2" * 500, "c0", "c1", "d0", "d1", "e0", "e1", "e2", "f", "g", "h"]
OTHERS = {".git/hidden.txt": b"hidden", "sub/.hidden.txt": b"hidden", "picture.png": b"\x89PNG"}


def read(path: str, dataset: str = "c4", start: int = 0) -> list[str]:
    return list(open_corpus(CorpusSpec(dataset, path)).documents(start))


def splits_of(path: str, fraction: float = 0.0) -> dict[str, Any]:
    found = prepare(CorpusSpec("c4", path), BytesTokenizer(), bos=True, eos=True, validation_fraction=fraction)
    assert_checksums(found)
    return found.meta["splits"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_is_read_like_one_on_a_disk(scheme: str, put: Put) -> None:
    url = put(scheme, CORPUS | OTHERS)
    if scheme == PROTOCOL:  # what stores' consoles put where a folder is made
        put(scheme, {"": b"", "sub/": b""})
    assert read(url) == read(f"{url}/") == TEXTS
    left_out = open_corpus(CorpusSpec("c4", url)).account().left_out
    assert left_out["of no known kind"].names == ["picture.png"]
    assert left_out["hidden"].names == [".git/hidden.txt", "sub/.hidden.txt"]
    assert [read(url, start=start) for start in range(len(TEXTS) + 1)] == [TEXTS[n:] for n in range(len(TEXTS) + 1)]
    assert read(url, "parquet") == ["e0", "e1", "e2"]
    assert read(f"{url}/b.jsonl", "text") == [CORPUS["b.jsonl"].decode()]


PATTERNS = [
    "*.jsonl",
    "**/*.[tm][xd]*",
    "**",
    "*",
    "sub/*",
    "s?b/*.md",
    "*.jsonl*",
    "**/.hid*.txt",
    "[!a-f]*.zst",
    "a.t*",
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_globs_match_what_they_match_on_a_disk(scheme: str, put: Put, tmp_path: Path) -> None:
    put("file", CORPUS | OTHERS)
    url = put(scheme, CORPUS | OTHERS)
    for pattern in PATTERNS:
        local, remote = (open_corpus(CorpusSpec("c4", f"{where}/{pattern}")) for where in (tmp_path / "stored", url))
        assert list(remote.documents()) == list(local.documents()), pattern
        assert remote.num_bytes == local.num_bytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_token_shards_are_the_same_as_by_path(scheme: str, put: Put, tmp_path: Path) -> None:
    put("file", CORPUS)
    url = put(scheme, CORPUS)
    for name in ["", *(f"/{name}" for name in CORPUS), "/*.jsonl*"]:
        assert splits_of(url + name) == splits_of(f"{tmp_path}/stored{name}"), name
    assert splits_of(url, 0.2) == splits_of(f"{tmp_path}/stored", 0.2) != splits_of(url)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fingerprint_follows_the_content(scheme: str, put: Put, tmp_path: Path) -> None:
    url = put(scheme, CORPUS)

    def fingerprint(name: str = "") -> str:
        return open_corpus(CorpusSpec("c4", url + name)).fingerprint(ContentHashes(cache_root()))

    whole, one, matched = before = fingerprint(), fingerprint("/a.txt"), fingerprint("/*.txt")
    assert (fingerprint(), fingerprint("/a.txt"), fingerprint("/*.txt")) == before
    put(scheme, {"a.txt": CORPUS["a.txt"].swapcase()})  # of the same size
    if scheme == "file":
        os.utime(tmp_path / "stored" / "a.txt", ns=(1, 1))
    assert fingerprint() != whole
    assert fingerprint("/a.txt") != one
    assert fingerprint("/*.txt") != matched
    put(scheme, CORPUS)
    assert (fingerprint(), fingerprint("/a.txt"), fingerprint("/*.txt")) == before
    put("file", CORPUS)
    local = open_corpus(CorpusSpec("c4", f"{tmp_path}/stored")).fingerprint(ContentHashes(cache_root()))
    assert local == whole
    put(scheme, {"new.txt": b"x"})
    assert fingerprint() not in (whole, one)


def test_a_change_while_it_is_prepared_is_noticed(put: Put) -> None:
    url = put(PROTOCOL, {"a.txt": b"x" * 200_000})

    def change(path: str, start: int, end: int) -> None:
        BucketFileSystem.objects["stored/corpus/b.txt"] = b"new"

    BucketFileSystem.before_fetch = staticmethod(change)
    with pytest.raises(DataError, match="the corpus changed while it was prepared"):
        splits_of(url)


def test_storage_that_marks_nothing_is_said_once(
    put: Put, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = put(PROTOCOL, {"a.txt": b"a", "b.txt": b"b"})
    plain = BucketFileSystem._facts
    monkeypatch.setattr(
        BucketFileSystem, "_facts", staticmethod(lambda key, content: {**plain(key, content), "ETag": None})
    )
    assert read(url) == ["a", "b"]
    assert [record.message for record in caplog.records] == [
        f"training.dataset_path: {url}/a.txt: the storage gives no ETag or time, so only a change of size is noticed "
        "at once; any other at the next preparation, or by check --rehash"
    ]
    assert read(f"{url}/b.txt") == ["b"]
    assert caplog.records[-1].message.startswith(f"training.dataset_path: {url}/b.txt: the storage gives no ETag")
    monkeypatch.setattr(
        BucketFileSystem, "_facts", staticmethod(lambda key, content: {**plain(key, content), "size": None})
    )
    with pytest.raises(DataError, match=r"a\.txt: the storage does not say how large it is"):
        read(url)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.zst", "a.txt.gz"])
def test_files_are_streamed(put: Put, name: str) -> None:
    texts = [os.urandom(4000).hex() for _ in range(2500)]  # 20 MB
    data = parquet(*texts) if "parquet" in name else lines(*texts)
    data = gzip.compress(data, 0) if name.endswith("gz") else data
    data = zstandard.compress(data, 1) if name.endswith("zst") else data
    url = put(PROTOCOL, {name: data})
    document = next(iter(open_corpus(CorpusSpec("c4", f"{url}/{name}")).document_parts()))
    next(iter(document))
    assert 0 < BucketFileSystem.num_fetched < len(data) / 2


class StorageError(Exception):
    """Of a storage's package: no OSError, and of several lines."""


FAILURES = {
    "lost": (
        ConnectionResetError(104, "Connection reset by peer"),
        r"cannot be read \(Connection reset by peer\)\. Check",
    ),
    "late": (TimeoutError(), r"cannot be read \(TimeoutError\)\. Check"),
    "denied": (PermissionError("Access Denied"), r"no permission to read it\. Check the credentials"),
    "gone": (FileNotFoundError("x"), r"does not exist\. Check the URL"),
    "other": (StorageError("Payload\nincomplete"), r"cannot be read \(Payload incomplete\)\. Check"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.zst", "a.jsonl.gz"])
def test_connection_lost_in_the_middle(put: Put, name: str) -> None:
    texts = [os.urandom(1000).hex() for _ in range(400)]
    data = parquet(*texts) if "parquet" in name else lines(*texts)
    data = gzip.compress(data, 0) if name.endswith("gz") else data
    data = zstandard.compress(data, 1) if name.endswith("zst") else data
    url = f"{put(PROTOCOL, {name: data})}/{name}"
    half = len(data) // 2
    for error, message in FAILURES.values():

        def fail(path: str, start: int, end: int, error: Exception = error) -> None:
            if start <= half < end:
                raise error

        BucketFileSystem.before_fetch = staticmethod(fail)
        with pytest.raises(DataError, match=rf"^training\.dataset_path: {url}: {message}") as caught:
            splits_of(url)
        assert "\n" not in str(caught.value)
    BucketFileSystem.before_fetch = staticmethod(lambda path, start, end: None)
    BucketFileSystem.lose_after = half
    with pytest.raises(DataError, match=rf"^training\.dataset_path: {url}: ") as caught:
        splits_of(url)
    assert "\n" not in str(caught.value)
    BucketFileSystem.lose_after = None
    assert splits_of(url)["train"]["num_documents"] == (1 if name == "a.txt" else 400)


def test_an_interrupted_preparation_goes_on(put: Put, tmp_path: Path) -> None:
    put("file", {"a.jsonl": lines(*(f"{n} " * 500 for n in range(2000)))})
    url = put(PROTOCOL, {"a.jsonl": (tmp_path / "stored/a.jsonl").read_bytes()})

    def fail(path: str, start: int, end: int) -> None:
        if end > 3_000_000:
            raise ConnectionResetError("lost")

    def prepared(path: str) -> dict[str, Any]:
        settings = {"bos": True, "eos": True, "validation_fraction": 0.0, "shard_tokens": 100_000}
        return prepare(CorpusSpec("c4", path), BytesTokenizer(), **settings).meta["splits"]

    # Read once already, so that the connection is lost in the middle of the preparation.
    open_corpus(CorpusSpec("c4", url)).fingerprint(ContentHashes(cache_root()))
    BucketFileSystem.before_fetch = staticmethod(fail)
    with pytest.raises(DataError, match="cannot be read"):
        prepared(url)
    BucketFileSystem.before_fetch = staticmethod(lambda path, start, end: None)
    assert prepared(url) == prepared(f"{tmp_path}/stored")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_there_is_said_with_key_and_url(scheme: str, put: Put) -> None:
    url = put(scheme, {"x.png": b"x", "empty/a.txt": b"", "wrong/b.jsonl": b"{}\n{", "bad/c.txt": b"a\xff"})
    messages = {
        "/nowhere.txt": r"/nowhere\.txt: does not exist\. Name a file, a folder or a glob",
        "/no*.txt": r"/no\*\.txt: the glob matches no file\. Name a file",
        "/x.png": r"/x\.png: no file of a known kind \(of no known kind: x\.png\)",
        "/empty": r"/empty: empty \(0 bytes in 1 files\)",
        "/wrong": r"/wrong/b\.jsonl:1: no field 'text'; it has: none\. Set data\.text_key",
        "/bad": r"/bad/c\.txt: byte offset 1 is not valid UTF-8",
    }
    for name, message in messages.items():
        for key in ("training.dataset_path", "validation.dataset_path"):
            with pytest.raises(DataError, match=rf"^{key}: {scheme}://\S+{message}") as caught:
                list(open_corpus(CorpusSpec("c4", url + name, key=key)).documents())
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no file of a known kind"):
        read(f"{url}/x.png")


def test_an_empty_folder_and_a_saved_dataset(put: Put, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    with pytest.raises(
        DataError, match=r"^training\.dataset_path: file://\S+/hollow: no file of a known kind \(nothing is there\)"
    ):
        read(f"file://{tmp_path}/hollow")
    url = put("memory", {"state.json": b"{}", "dataset_info.json": b"{}", "data-00000-of-00001.arrow": b"x"})
    with pytest.raises(DataError, match=r"a saved dataset is read from a disk only\. Copy it to one"):
        read(url)


@pytest.mark.parametrize("scheme", ["nope", "S3"])
def test_an_unknown_scheme(scheme: str) -> None:
    with pytest.raises(
        DataError, match=rf"^training\.dataset_path: {scheme}://b/a\.txt: unknown scheme '{scheme}'\. Use"
    ):
        read(f"{scheme}://b/a.txt")
    with pytest.raises(DataError, match=r"^data\.tokenizer_path: \S+: unknown scheme"):
        tokenizer_of(f"{scheme}://b/a.model")


class Nothing(Corpus):
    """A corpus that a tokenizer from a URL has no need of."""

    num_bytes = None

    def describe(self) -> str:
        raise AssertionError

    def fingerprint(self, hashes: ContentHashes) -> str:
        raise AssertionError

    def account(self) -> Account:
        raise AssertionError

    def document_parts(self, start: int = 0, account: Account | None = None) -> Iterator[Any]:
        raise AssertionError


def test_a_url_without_a_bucket() -> None:
    with pytest.raises(
        DataError, match=r"^training\.dataset_path: bucket://: names no bucket\. Write bucket://BUCKET/PATH"
    ):
        read("bucket://")


def tokenizer_of(url: str, kind: str = "auto", vocab_size: int = 1000, assets: bool = False) -> Tokenizer:
    where: dict[str, Any] = {"hf_assets_path": url} if assets else {"path": url}
    return load_or_train(TokenizerSpec(kind, **where, vocab_size=vocab_size), Nothing(), None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tokenizer_is_fetched_once(scheme: str, put: Put, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    definition, settings = small_tokenizer(), json.dumps({"bos_token": "</s>", "eos_token": None}).encode()
    url = put(
        scheme, {"tokenizer.json": definition, "tokenizer_config.json": settings, "model.safetensors": b"x" * 999}
    )
    found = tokenizer_of(url)
    assert found.files() == {"tokenizer.json": definition, "tokenizer_config.json": settings}
    assert (found.bos_id, found.eos_id) == (1, None)
    assert tokenizer_of(f"{url}/tokenizer.json").fingerprint() == found.fingerprint()
    assert tokenizer_of(url, "huggingface", assets=True).fingerprint() == found.fingerprint()
    assert len([record for record in caplog.records if record.message.startswith("fetched")]) == 1
    assert len(list(cache.glob("tokenizers/*/*"))) == 2
    put(scheme, {"tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "</s>"}'})
    changed = tokenizer_of(url)
    assert (changed.bos_id, changed.eos_id) == (0, 1)
    assert changed.fingerprint() != found.fingerprint()


def test_a_tokenizer_that_cannot_be_used(put: Put) -> None:
    url = put(PROTOCOL, {"none/a.txt": b"", "bad.json": b"{}", "bad.model": b"x", "t.json": small_tokenizer()})
    messages = {
        "/nowhere": r"does not exist\. Check the URL",
        "/none": r"the folder holds no tokenizer\.json or tokenizer\.model\. Name a folder",
        "/bad.json": r".*bad\.json: not a Hugging Face tokenizer\.json",
        "/bad.model": r".*bad\.model: not a SentencePiece model",
        "/none/a.txt": r".*its kind cannot be told",
    }
    for name, message in messages.items():
        for key, assets in (("data.tokenizer_path", False), ("model.hf_assets_path", True)):
            with pytest.raises(DataError, match=rf"^{key}: {url}{name}: {message}") as caught:
                tokenizer_of(url + name, assets=assets)
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=rf"^tokenizer huggingface {url}/t\.json: it has 258 tokens, more than"):
        tokenizer_of(f"{url}/t.json", vocab_size=100)

    def refuse(path: str, start: int, end: int) -> None:
        raise PermissionError("Forbidden")

    BucketFileSystem.before_fetch = staticmethod(refuse)
    put(PROTOCOL, {"t.json": small_tokenizer() + b"\n"})
    with pytest.raises(
        DataError, match=rf"^data\.tokenizer_path: {url}/t\.json: no permission to read it\. Check the cred"
    ):
        tokenizer_of(f"{url}/t.json")


def test_the_cache_stays_on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_GROWTH_CACHE", "memory://cache")
    with pytest.raises(DataError, match=r"^TITAN_GROWTH_CACHE: memory://cache is a URL, but .* Name a folder"):
        cache_root()
