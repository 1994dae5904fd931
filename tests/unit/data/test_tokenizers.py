"""Tokenizers: exact round trips, deterministic training, and refusals that say what to do."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import tokenizers as hf

from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.tokenizer_training import sample_lines, train_sentencepiece
from titan_growth.data.tokenizers import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerSpec,
    load_or_train,
    load_tokenizer,
)
from titan_growth.tools.errors import DataError

NASTY = [
    "",
    " ",
    "\n\n\t\t  x",
    " a  b ",
    "a\r\nb\r",
    "é漢\u2028\U0001d518\u0301",
    "</s><s><unk><0x41>",
    "\x00\x7f",
    "1234 5.6",
]


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return open_corpus(CorpusSpec())


@pytest.fixture(scope="module")
def model(stdlib: Corpus) -> bytes:
    return train_sentencepiece(stdlib, 2048)


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    (tmp_path / "small.txt").write_text("hello world\nhello there\n" * 3)
    return open_corpus(CorpusSpec("text", str(tmp_path / "small.txt")))


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A byte-level BPE with two special tokens, as the tokenizers library writes it."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end_of_text|>", "[START]", "<s>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello there"] * 5, trainer)
    tokenizer.enable_truncation(3)
    folder = tmp_path / "assets"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def round_trips(tokenizer: Tokenizer, texts: list[str]) -> None:
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.bos_id not in ids
        assert tokenizer.eos_id not in ids


def test_bytes() -> None:
    tokenizer = BytesTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([256, 0xC3, 0xA9, 257]) == "é"
    round_trips(tokenizer, NASTY)


def test_trained_model_round_trips_python_sources(stdlib: Corpus, model: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(model)
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2048, 1, 2)
    documents = [text for number, text in enumerate(stdlib.documents()) if number % 5 == 0]
    round_trips(tokenizer, documents + NASTY)
    # A tokenizer that fell back to bytes or characters would round-trip, too.
    assert sum(map(len, documents)) / sum(map(len, tokenizer.encode_batch(documents))) > 2.5
    # Pieces of a cut document are encoded one by one; no space may come in between.
    assert tokenizer.decode(tokenizer.encode("de") + tokenizer.encode("f x")) == "def x"
    assert tokenizer.fingerprint() == hashlib.sha256(model).hexdigest()


def test_training_is_deterministic_and_silent(stdlib: Corpus, model: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    assert train_sentencepiece(stdlib, 2048) == model
    assert capfd.readouterr() == ("", "")


def test_sample_is_bounded_spread_and_cut(stdlib: Corpus, tmp_path: Path) -> None:
    sample = list(sample_lines(stdlib))
    assert 3e6 < sum(map(len, sample)) <= 4e6 + 1000
    last_document = list(stdlib.documents())[-1].split("\n")
    assert set(sample[-20:]) & set(last_document)
    (tmp_path / "long.txt").write_text("word " * 50_000)
    assert {len(line) for line in sample_lines(open_corpus(CorpusSpec("text", str(tmp_path / "long.txt"))))} == {1000}


def test_too_small_corpus_names_the_largest_possible_vocab(small: Corpus) -> None:
    with pytest.raises(
        DataError, match=r"too small for a vocab_size of 2,048\. The largest possible is (\d+)"
    ) as caught:
        train_sentencepiece(small, 2048)
    largest = int(re.search(r"possible is (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert train_sentencepiece(small, largest)
    with pytest.raises(DataError, match=f"largest possible is {largest}"):
        train_sentencepiece(small, largest + 1)


def test_too_small_vocab(stdlib: Corpus, small: Corpus) -> None:
    with pytest.raises(DataError, match=r"vocab_size 100 is too small\. Use at least 262"):
        train_sentencepiece(small, 100)
    with pytest.raises(DataError, match=r"smaller than the characters .* Set it to more than \d+"):
        train_sentencepiece(stdlib, 270)


def test_error_of_the_corpus_survives_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text here\n" * 50)
    (tmp_path / "b.txt").write_bytes(b"ok\xff")
    for vocab_size in (270, 2048):  # with the second, the trainer fails by itself as well
        with pytest.raises(DataError, match=r"b\.txt: byte offset 2 is not valid UTF-8"):
            train_sentencepiece(open_corpus(CorpusSpec("text", str(tmp_path))), vocab_size)


def test_trained_tokenizer_is_cached_by_corpus_and_size(small: Corpus, tmp_path: Path) -> None:
    spec = TokenizerSpec(vocab_size=270)
    first = load_or_train(spec, small, tmp_path / "cache")
    models = list((tmp_path / "cache" / "tokenizers").glob("*.model"))
    assert len(models) == 1
    written = models[0].stat().st_mtime_ns
    assert load_or_train(spec, small, tmp_path / "cache").fingerprint() == first.fingerprint()
    assert models[0].stat().st_mtime_ns == written
    load_or_train(TokenizerSpec(vocab_size=271), small, tmp_path / "cache")
    (tmp_path / "small.txt").write_text("other words\n" * 9)
    load_or_train(spec, open_corpus(CorpusSpec("text", str(tmp_path / "small.txt"))), tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "tokenizers").glob("*.model"))) == 3


def test_hugging_face_round_trips_and_ignores_truncation(hf_folder: Path) -> None:
    for path in (hf_folder, hf_folder / "tokenizer.json"):
        tokenizer = HuggingFaceTokenizer(path)
        assert isinstance(tokenizer, Tokenizer)
        round_trips(tokenizer, [text for text in NASTY if "<s>" not in text])
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (273, 2, 0)


def test_hugging_face_special_tokens_come_from_the_files_next_to_it(hf_folder: Path) -> None:
    before = HuggingFaceTokenizer(hf_folder).fingerprint()
    (hf_folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "[START]"}}))
    tokenizer = HuggingFaceTokenizer(hf_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    assert tokenizer.fingerprint() != before
    (hf_folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": None}))
    tokenizer = HuggingFaceTokenizer(hf_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, None)
    (hf_folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nope>"}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: its bos_token '<nope>' is not in tokenizer\.json"):
        HuggingFaceTokenizer(hf_folder)
    (hf_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: broken JSON"):
        HuggingFaceTokenizer(hf_folder)


def test_files_make_the_same_tokenizer_again(hf_folder: Path, model: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(model)
    (hf_folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "[START]"}))
    originals = [BytesTokenizer(), SentencePieceTokenizer(tmp_path / "t.model"), HuggingFaceTokenizer(hf_folder)]
    for number, original in enumerate(originals):
        copy = tmp_path / f"copy{number}"
        copy.mkdir()
        for name, content in original.files().items():
            (copy / name).write_bytes(content)
        loaded = load_tokenizer(copy)
        assert type(loaded) is type(original)
        assert loaded.fingerprint() == original.fingerprint()
        assert (loaded.bos_id, loaded.eos_id) == (original.bos_id, original.eos_id)


def test_auto_finds_the_kind(hf_folder: Path, model: bytes, small: Corpus, tmp_path: Path) -> None:
    def kind(**values: str) -> type:
        return type(load_or_train(TokenizerSpec(**values), small, tmp_path / "cache"))  # type: ignore[arg-type]

    (tmp_path / "t.model").write_bytes(model)
    assert kind(path=str(tmp_path / "t.model")) is SentencePieceTokenizer
    assert kind(path=str(hf_folder / "tokenizer.json")) is HuggingFaceTokenizer
    assert kind(path=str(hf_folder)) is HuggingFaceTokenizer
    assert kind(hf_assets_path=str(hf_folder)) is HuggingFaceTokenizer
    assert kind(path=str(tmp_path / "t.model"), hf_assets_path=str(hf_folder)) is SentencePieceTokenizer
    assert kind(kind="bytes") is BytesTokenizer
    (hf_folder / "tokenizer.json").rename(hf_folder / "other.json")
    with pytest.raises(DataError, match=r"assets: the folder holds no tokenizer\.json or tokenizer\.model"):
        kind(hf_assets_path=str(hf_folder))
    (hf_folder / "tokenizer.model").write_bytes(model)
    assert kind(hf_assets_path=str(hf_folder)) is SentencePieceTokenizer


def test_refusals(hf_folder: Path, model: bytes, small: Corpus, tmp_path: Path) -> None:
    def refused(message: str, **values: object) -> None:
        with pytest.raises(DataError, match=message) as caught:
            load_or_train(TokenizerSpec(**values), small, tmp_path / "cache")  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    (tmp_path / "bad.model").write_bytes(model[:1000])
    (tmp_path / "bad.json").write_text('{"model": 1}')
    (tmp_path / "odd.bin").write_text("")
    refused(r"bad\.model: not a SentencePiece model", path=str(tmp_path / "bad.model"))
    refused(r"bad\.json: not a Hugging Face tokenizer\.json", path=str(tmp_path / "bad.json"))
    refused(r"odd\.bin: its kind cannot be told", path=str(tmp_path / "odd.bin"))
    refused(r"gone\.model: does not exist", path=str(tmp_path / "gone.model"))
    refused(r"kind 'gpt': unknown\. Use one of auto, sentencepiece", kind="gpt")
    refused(r"needs a tokenizer\.json", kind="huggingface")
    refused(r"258 tokens, more than the model's vocabulary of 257", kind="bytes", vocab_size=257)
    refused(r"273 tokens, more than the model's vocabulary of 272", path=str(hf_folder), vocab_size=272)
    assert load_or_train(TokenizerSpec(path=str(hf_folder), vocab_size=273), small, None).vocab_size == 273
