"""What preparation makes of documents that are cut, of special tokens that a text spells, and of BOS = EOS."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from tests.unit.data.test_preparation import documents_of, write_corpus
from titan_growth.data import windows
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import PreparedCorpus, open_prepared
from titan_growth.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, TokenizerSpec

END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_GROWTH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A tokenizer as GPT-2's: one token is BOS and EOS."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    folder = tmp_path / "gpt2"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": END, "eos_token": END}))
    return folder


def prepared(spec: CorpusSpec, folder: Path, *, allow: bool = False, bos: bool = True, eos: bool = True):
    tokenizer = TokenizerSpec(path=str(folder), allow_special_tokens=allow)
    return prepare(spec, tokenizer, bos=bos, eos=eos, validation_fraction=0.0)


@pytest.mark.parametrize("whole_chars", [windows.WHOLE_CHARS, 5000])
def test_a_dummy_prefix_stands_once_in_a_document(
    whole_chars: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WHOLE_CHARS", whole_chars)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["line after line, and 0123456789"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    text = "".join(f"line {number}\n" for number in range(2500))
    (tmp_path / "one.txt").write_text(text)
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    corpus = prepare(
        CorpusSpec("text", str(tmp_path / "one.txt")), tokenizer, bos=True, eos=True, validation_fraction=0.1
    )
    assert corpus.validation is not None
    train, validation = documents_of(corpus.train), documents_of(corpus.validation)
    assert len(train) + len(validation) >= 3
    runs = [run for pair in zip(train, validation, strict=False) for run in pair] + train[len(validation) :]
    assert [token for run in runs for token in run] == [1, *tokenizer.encode(text), 2]


@pytest.mark.parametrize("allow", [False, True])
def test_spelled_special_tokens_are_counted(
    allow: bool, gpt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "titan_growth")
    spec = write_corpus(tmp_path / "c", [f"a{END}b" * 26, "none", END])
    corpus = prepared(spec, gpt2, allow=allow)
    tokens = corpus.train.read(0, corpus.train.num_tokens).tolist()
    assert tokens.count(0) == (3 + 27 if allow else 3)
    assert corpus.meta["special_tokens_in_text"] == {"num_documents": 2, "num_occurrences": 27}
    how = "those tokens" if allow else "any other text"
    assert f"the text of 2 documents spells special tokens, 27 times in all; it is encoded as {how}" in caplog.text
    assert corpus.tokenizer.allows_special_tokens is allow
    other = prepared(spec, gpt2, allow=not allow)
    assert other.folder != corpus.folder
    assert other.meta["tokenizer"]["fingerprint"] == corpus.meta["tokenizer"]["fingerprint"]


def test_a_tokenizer_that_makes_no_special_tokens_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = write_corpus(tmp_path / "c", ["text"])
    prepare(spec, TokenizerSpec("bytes", allow_special_tokens=True), bos=True, eos=True, validation_fraction=0.0)
    assert "data.allow_special_tokens has no effect: tokenizer bytes makes no special token" in caplog.text


def test_where_bos_is_eos_documents_get_it_once(gpt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = write_corpus(tmp_path / "c", ["a", "b"])
    corpus = prepared(spec, gpt2)
    a, b = corpus.tokenizer.encode("ab")
    assert documents_of(corpus.train) == [[a, 0], [b, 0]]
    assert "BOS and EOS are one token, so documents get it once, after their ends" in caplog.text
    assert prepared(spec, gpt2, bos=False).folder == corpus.folder
    assert documents_of(prepared(spec, gpt2, eos=False).train) == [[0, a], [0, b]]


def test_what_version_1_prepared_is_made_again_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "titan_growth")
    spec = write_corpus(tmp_path / "c", ["some text"])

    def made() -> PreparedCorpus:
        return prepare(spec, BytesTokenizer(), bos=True, eos=True, validation_fraction=0.0)

    folder = made().folder
    meta = json.loads((folder / "meta.json").read_bytes())
    meta["format_version"] = 1
    del meta["allow_special_tokens"], meta["special_tokens_in_text"]
    (folder / "meta.json").write_text(json.dumps(meta))
    folder.rename(folder.with_name("0" * 32))
    caplog.clear()
    assert np.array_equal(made().train.read(0, 3), [256, ord("s"), ord("o")])
    assert "was prepared before by an earlier version, whose tokens differ where" in caplog.text
    assert open_prepared(folder) is not None
