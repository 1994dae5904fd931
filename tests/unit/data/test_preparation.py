"""Preparation: the splits, the index, the cache key, damage, and the errors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import titan_growth
from tests.unit.data.checksums import assert_checksums
from titan_growth.data import content
from titan_growth.data.content import mark_of
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import PreparedCorpus, TokenSplit
from titan_growth.data.splitting import cut, split_rule
from titan_growth.data.storage import cache_root
from titan_growth.data.tokenizers import BytesTokenizer, TokenizerSpec
from titan_growth.tools.errors import DataError
from titan_growth.tools.sealed import sealed

BOS, EOS = 256, 257


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TITAN_GROWTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_corpus(folder: Path, texts: list[str]) -> CorpusSpec:
    folder.mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return CorpusSpec("json", str(folder))


def prepared(
    spec: CorpusSpec, fraction: float = 0.0, bos: bool = True, eos: bool = True, shard_tokens: int = 1000
) -> PreparedCorpus:
    return prepare(spec, BytesTokenizer(), bos=bos, eos=eos, validation_fraction=fraction, shard_tokens=shard_tokens)


def documents_of(split: TokenSplit) -> list[list[int]]:
    """The split's documents as the index has them."""
    starts = split.document_starts(0, split.num_tokens).tolist()
    assert len(starts) == split.num_documents
    tokens = split.read(0, split.num_tokens).tolist()
    assert not starts or starts[0] == 0
    return [tokens[start:stop] for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def numbered_lines(num_chars: int) -> str:
    return "".join(f"line {number}\n" for number in range(num_chars // 6))[:num_chars]


def test_whole_documents_get_bos_and_eos_and_empty_ones_vanish(tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c", ["ab", "", "é", "x" * 2500])
    encode = BytesTokenizer().encode
    texts = [encode("ab"), encode("é"), encode("x" * 2500)]
    for bos, eos in ((True, True), (True, False), (False, True), (False, False)):
        corpus = prepared(spec, bos=bos, eos=eos)
        assert documents_of(corpus.train) == [[BOS] * bos + text + [EOS] * eos for text in texts]
        assert corpus.validation is None
    assert [row["documents"] for row in corpus.meta["account"]["kinds"]] == [3]


@pytest.mark.parametrize("shard_tokens", [1, 7, 2507, 2508, 2509, 10**6])
def test_stream_does_not_depend_on_shards(tmp_path: Path, shard_tokens: int) -> None:
    corpus = prepared(
        write_corpus(tmp_path / "c", ["ab", "cd", "x" * 2497 + "yz"][: 3 if shard_tokens > 6 else 2]),
        shard_tokens=shard_tokens,
    )
    expected = [token for document in documents_of(corpus.train) for token in document]
    assert expected[:8] == [BOS, 97, 98, EOS, BOS, 99, 100, EOS]
    total = corpus.train.num_tokens
    assert total == (2509 if shard_tokens > 6 else 8)
    assert len(list(corpus.folder.glob("train-*.bin"))) == -(-total // shard_tokens)
    for start, stop in ((0, total), (3, 8), (total - 1, total), (total, total), (0, 0), (5, 7)):
        assert corpus.train.read(start, stop).tolist() == expected[start:stop]
    with pytest.raises(IndexError):
        corpus.train.read(0, total + 1)
    assert_checksums(corpus)


def test_one_file_corpus_gets_a_validation_set_that_covers_the_rest(tmp_path: Path) -> None:
    text = numbered_lines(300_000)
    (tmp_path / "one.txt").write_text(text)
    corpus = prepared(CorpusSpec("text", str(tmp_path / "one.txt")), fraction=0.1)
    assert corpus.validation is not None
    train, validation = documents_of(corpus.train), documents_of(corpus.validation)
    assert 0.05 < corpus.validation.num_tokens / 300_000 < 0.15
    # Runs alternate, beginning with training; in this order they are the text, without loss or overlap.
    runs = [run for pair in zip(train, validation, strict=False) for run in pair] + train[len(validation) :]
    tokens = [token for run in runs for token in run]
    assert tokens == [BOS, *text.encode(), EOS]
    # BOS and EOS stand at the document's real ends only, and pieces begin at lines.
    assert sum(run[0] == BOS for run in runs) == sum(run[-1] == EOS for run in runs) == 1
    assert all(bytes(run[:5]) == b"line " for run in runs[1:])
    # Nothing of validation is in training (every line of the text is different).
    train_lines = {line for run in train for line in bytes(run[1:-1]).split(b"\n")[1:-1]}
    assert not train_lines & {line for run in validation for line in bytes(run).split(b"\n")[1:-1]}


def test_short_documents_are_dealt_whole_by_number(tmp_path: Path) -> None:
    corpus = prepared(write_corpus(tmp_path / "c", [f"d{number}" for number in range(25)]), fraction=0.1)
    assert corpus.validation is not None
    assert documents_of(corpus.validation) == [[BOS, *f"d{number}".encode(), EOS] for number in (1, 11, 21)]
    assert corpus.train.num_documents == 22


def test_cut_keeps_the_text_and_ignores_how_it_came_in() -> None:
    texts = [numbered_lines(50_000), "word " * 9000, "x" * 30_001, "漢\n" * 20_000, "short", "x" * 5120, ""]
    for text in texts:
        pieces = list(cut([text], 4096))
        assert "".join(piece.text for piece in pieces) == text
        assert all(3072 <= len(piece.text) <= 4096 for piece in pieces[:-1])
        assert all(len(piece.text) <= 5120 for piece in pieces)
        assert [piece.begins_document for piece in pieces] == [number == 0 for number in range(len(pieces))]
        assert [piece.ends_document for piece in pieces] == [number == len(pieces) - 1 for number in range(len(pieces))]
        for size in (999, 4096, 7001):
            assert list(cut([text[at : at + size] for at in range(0, len(text), size)], 4096)) == pieces
    assert all(piece.text.endswith("\n") for piece in list(cut([texts[0]], 4096))[:-1])
    assert all(piece.text.startswith(" ") for piece in list(cut([texts[1]], 4096))[1:])


def test_piece_length_follows_the_corpus_size() -> None:
    assert split_rule(0.01, 300_000).piece_chars == 4096
    assert split_rule(0.01, 12_000_000).piece_chars == 30_000
    assert split_rule(0.01, 10**12).piece_chars == 2**20
    assert [split_rule(fraction, 1).period for fraction in (0.0, 0.5, 0.1, 0.01)] == [0, 2, 10, 100]
    with pytest.raises(DataError, match=r"validation_fraction 0\.7: not between 0 and 0\.5"):
        split_rule(0.7, 1)


def test_second_call_reads_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "titan_growth")
    spec = write_corpus(tmp_path / "c", ["text"])
    first = prepared(spec)
    assert [record.message.split()[0] for record in caplog.records] == ["preparing", "prepared", "data:", "data:"]
    assert "prepared 6 tokens in" in caplog.records[1].message
    assert caplog.records[3].message.split() == ["data:", "json", "1", "17", "1", "6"]
    caplog.clear()
    assert prepared(spec).folder == first.folder
    assert not caplog.records


def test_whatever_matters_changes_the_folder(tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c", ["some text here", "more of it"])
    folders = [
        prepared(spec).folder,
        prepared(spec, bos=False).folder,
        prepared(spec, eos=False).folder,
        prepared(spec, fraction=0.5).folder,
        prepare(spec, TokenizerSpec(vocab_size=276), bos=True, eos=True, validation_fraction=0.0).folder,
    ]
    write_corpus(tmp_path / "c", ["some text here", "less of it."])
    folders.append(prepared(spec).folder)
    assert len(set(folders)) == len(folders)


def twins(tmp_path: Path) -> tuple[CorpusSpec, CorpusSpec]:
    """Two corpora of equal names, sizes and times, as archives and images unpack them."""
    specs = []
    for name, text in (("one", "some text"), ("other", "else text")):
        specs.append(write_corpus(tmp_path / name, [text]))
        os.utime(tmp_path / name / "corpus.jsonl", ns=(0, 0))
    sizes = {(Path(spec.dataset_path or "") / "corpus.jsonl").stat().st_size for spec in specs}
    assert len(sizes) == 1
    return specs[0], specs[1]


def test_equal_names_sizes_and_times_are_two_preparations(tmp_path: Path) -> None:
    one, other = twins(tmp_path)
    texts = [bytes(documents_of(prepared(spec).train)[0][1:-1]) for spec in (one, other)]
    assert texts == [b"some text", b"else text"]
    tokenizers = [
        prepare(spec, TokenizerSpec(vocab_size=270), bos=True, eos=True, validation_fraction=0.0).tokenizer
        for spec in (one, other)
    ]
    assert tokenizers[0].fingerprint() != tokenizers[1].fingerprint()


def test_a_moved_corpus_and_one_with_other_times_is_found_prepared(tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c", ["text"])
    folder = prepared(spec).folder
    (tmp_path / "c").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "corpus.jsonl", ns=(1, 1))
    moved = prepared(CorpusSpec("json", str(tmp_path / "moved")))
    assert (moved.folder, moved.description) == (folder, f"{tmp_path / 'moved'} (1 files, 0.0 MB)")


def test_what_an_earlier_version_prepared_is_made_again_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name holds no content, so it may be of a twin. Its tokens are the same, so a run goes on."""
    caplog.set_level(logging.INFO, "titan_growth")
    spec = write_corpus(tmp_path / "c", ["some text"])
    before = prepared(spec)
    meta = json.loads((before.folder / "meta.json").read_bytes())
    meta["corpus"]["fingerprint"] = "files-" + "0" * 64
    (before.folder / "meta.json").write_text(json.dumps(meta))
    before.folder.rename(before.folder.with_name("0" * 32))
    caplog.clear()
    after = prepared(spec)
    assert after.meta["splits"] == before.meta["splits"]
    assert (
        "was prepared before from other content, by other rules (data.text_key, data.on_bad_row), or by an earlier"
        in caplog.text
    )


def pretend_remembered(cache: Path, corpus: Path) -> None:
    """Puts the present mark of every file of a folder beside the hash that it had."""
    for table in cache.glob("hashes/*.json"):
        kept = json.loads(table.read_bytes())
        for name, entry in kept["files"].items():
            entry[1] = mark_of((corpus / name).stat())
        kept.pop("sha256")
        table.write_text(sealed(kept))


@pytest.mark.parametrize("how", ["preparation", "rehash"])
def test_a_change_that_no_time_shows_is_found_at_the_next_preparation(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    monkeypatch.setattr(content, "_FRESH_NS", 0)
    spec = write_corpus(tmp_path / "c", ["some text"])
    before = prepared(spec)
    write_corpus(tmp_path / "c", ["else text"])
    pretend_remembered(cache, tmp_path / "c")
    assert prepared(spec).folder == before.folder  # so it must be looked for
    if how == "rehash":
        after = prepare(spec, BytesTokenizer(), bos=True, eos=True, validation_fraction=0.0, rehash=True)
    else:
        after = prepared(spec, bos=False)
    assert b"else text" in bytes(token for token in documents_of(after.train)[0] if token < 256)
    assert "other content than before under the same size and times: corpus.jsonl" in caplog.text
    assert prepared(spec).folder != before.folder


def test_rehash_compares_the_checksums_of_what_is_prepared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = write_corpus(tmp_path / "c", ["some text"])
    shard = prepared(spec).folder / "train-00000.bin"
    before = shard.read_bytes()
    shard.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    assert prepared(spec).train.read(0, 1).tolist() == [BOS + 1]
    caplog.clear()
    again = prepare(spec, BytesTokenizer(), bos=True, eos=True, validation_fraction=0.0, rehash=True)
    assert again.train.read(0, 1).tolist() == [BOS]
    assert "train-00000.bin does not match its checksum" in caplog.text


@pytest.mark.parametrize("damage", ["truncate", "remove", "index", "tokenizer", "meta"])
def test_damage_is_reported_once_and_mended(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = write_corpus(tmp_path / "c", ["some text"] * 300)
    corpus = prepared(spec)
    expected = documents_of(corpus.train)
    shard = corpus.folder / "train-00001.bin"
    if damage == "truncate":
        os.truncate(shard, 100)
    elif damage == "remove":
        shard.unlink()
    elif damage == "index":
        os.truncate(corpus.folder / "train.idx", 8)
    elif damage == "tokenizer":
        (corpus.folder / "tokenizer.bytes").unlink()
    else:
        (corpus.folder / "meta.json").write_text("{")
    caplog.set_level(logging.INFO, "titan_growth")
    again = prepared(spec)
    assert documents_of(again.train) == expected
    assert "was prepared before" not in caplog.text
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    if damage == "truncate":
        assert "train-00001.bin has 100 bytes instead of 2,000" in warnings[0]


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    import tokenizers as hf

    words = {f"w{number}": number for number in range(70_000)}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = write_corpus(tmp_path / "c", ["w1 w69999 w5"])
    tokenizer_spec = TokenizerSpec(path=str(tmp_path / "tokenizer.json"), vocab_size=70_000)
    corpus = prepare(spec, tokenizer_spec, bos=False, eos=False, validation_fraction=0.0)
    assert corpus.train.read(0, 3).tolist() == [1, 69_999, 5]
    assert (corpus.folder / "train-00000.bin").stat().st_size == 12
    with pytest.raises(DataError, match=r"it has no BOS token\. Set data\.bos = false"):
        prepare(spec, tokenizer_spec, bos=True, eos=False, validation_fraction=0.0)
    with pytest.raises(DataError, match=r"it has no EOS token\. Set data\.eos = false"):
        prepare(spec, tokenizer_spec, bos=False, eos=True, validation_fraction=0.0)


def test_corpus_without_text_and_broken_corpus_leave_nothing(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"holds no text to train on"):
        prepared(write_corpus(tmp_path / "c", ["", ""]), bos=False, eos=False)
    spec = write_corpus(tmp_path / "c", ["good"])
    (tmp_path / "c" / "more.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"more\.jsonl:1: broken JSON"):
        prepared(spec)
    assert not [path for path in (cache / "prepared").iterdir() if path.is_dir()]


def test_corpus_that_changes_meanwhile_is_refused(tmp_path: Path, cache: Path) -> None:
    spec = write_corpus(tmp_path / "c", ["good"])

    class Changing(BytesTokenizer):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            (tmp_path / "c" / "corpus.jsonl").write_text('{"text": "other"}\n')
            return super().encode_batch(texts)

    with pytest.raises(DataError, match=r"the corpus changed while it was prepared\. Start again"):
        prepare(spec, Changing(), bos=True, eos=True, validation_fraction=0.0)
    assert not list(cache.glob("prepared/*/meta.json"))


def test_nothing_goes_on_from_what_stood_in_place_of_a_corpus(tmp_path: Path, cache: Path) -> None:
    spec = write_corpus(tmp_path / "c", ["short"] * 5000)
    last = tmp_path / "c" / "last.jsonl"
    last.write_text('{"text": "true"}\n' * 5000)
    expected = prepared(spec).train.read(0, 60_000)

    (tmp_path / "new.jsonl").write_text('{"text": "else"}\n' * 5000)

    class Changing(BytesTokenizer):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            with contextlib.suppress(FileNotFoundError):  # once, and in one go: other batches are under way
                (tmp_path / "new.jsonl").replace(last)
            return super().encode_batch(texts)

    settings = {"bos": True, "eos": True, "validation_fraction": 0.0, "shard_tokens": 20_000}
    with pytest.raises(DataError, match="the corpus changed while it was prepared"):
        prepare(spec, Changing(), cache_dir=tmp_path / "second", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("second/prepared/*/*"))
    last.write_text('{"text": "true"}\n' * 5000)
    again = prepare(spec, BytesTokenizer(), cache_dir=tmp_path / "second", **settings)  # type: ignore[arg-type]
    assert np.array_equal(again.train.read(0, 60_000), expected)


def test_unwritable_cache_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TITAN_GROWTH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot be written .*TITAN_GROWTH_CACHE to a writable folder"):
        prepared(write_corpus(tmp_path / "c", ["text"]))


def test_full_disk_names_the_way_out(tmp_path: Path) -> None:
    spec = write_corpus(tmp_path / "c", ["x" * 3000] * 50)
    program = (
        "import resource, signal, sys\n"
        "from titan_growth.data.corpus import CorpusSpec\n"
        "from titan_growth.data.preparation import prepare\n"
        "from titan_growth.data.tokenizers import TokenizerSpec\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    prepare(CorpusSpec('json', sys.argv[1]), TokenizerSpec('bytes'), bos=True, eos=True,\n"
        "        validation_fraction=0.0)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, spec.dataset_path or ""],
        env={**os.environ, "PYTHONPATH": str(Path(titan_growth.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("DataError cache "), done.stdout + done.stderr
    assert (
        "cannot be written (File too large). Set data.cache_dir or the environment variable TITAN_GROWTH_CACHE"
        in done.stdout
    )


def test_cache_root_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("TITAN_GROWTH_CACHE")
    assert cache_root() == tmp_path / "xdg" / "titan_growth"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / "home" / ".cache" / "titan_growth"


def test_split_travels_to_workers_without_its_data(tmp_path: Path) -> None:
    split = prepared(write_corpus(tmp_path / "c", ["x" * 100_000])).train
    expected = split.read(0, 50_000)
    data = pickle.dumps(split)
    assert len(data) < 20_000
    assert np.array_equal(pickle.loads(data).read(0, 50_000), expected)
