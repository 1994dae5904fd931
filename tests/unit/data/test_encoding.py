"""The tokens of a document are those of the whole document, wherever it is cut and whatever the tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from tests.unit.data.random_tokenizers import KINDS, random_text, random_tokenizer
from titan_growth.data import windows
from titan_growth.data.encoding import DocumentEncoder, Part
from titan_growth.data.splitting import TRAIN, VALIDATION, SplitRule, cut
from titan_growth.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, Tokenizer
from titan_growth.data.windows import Beginning, Window, windows_of
from titan_growth.tools.errors import DataError

PIECE_CHARS = 4096


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WHOLE_CHARS", 5000)
    monkeypatch.setattr(windows, "SEGMENT_CHARS", 2048)


def batches(found: Iterator[Window], size: int = 3) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in found:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def parts_of(tokenizer: Tokenizer, texts: Sequence[str], period: int = 2) -> list[Part]:
    rule = SplitRule(PIECE_CHARS, period)
    found = windows_of([(text,) for text in texts], Beginning(), rule, tokenizer.special_texts)
    return [part for batch in DocumentEncoder(tokenizer, 2).encode(batches(found)) for part in batch]


def assert_whole(tokenizer: Tokenizer, text: str) -> None:
    """The tokens are those of the text, and those of a split start in its pieces."""
    (whole,) = tokenizer.encode_with_starts([text])
    assert whole.ids == tokenizer.encode(text)
    for period in (0, 2, 3):
        parts = parts_of(tokenizer, [text], period)
        assert "".join(segment.text for part in parts for segment in part.segments) == text
        tokens = np.concatenate([part.tokens for part in parts]).tolist()
        if tokenizer.rounds_long_texts and tokens != whole.ids:
            # Equally good, and rounded otherwise: the same text in about as many pieces.
            assert tokenizer.decode(tokens) == tokenizer.decode(whole.ids)
            assert abs(len(tokens) - len(whole.ids)) <= len(tokens) // 100
            continue
        assert tokens == whole.ids
        starts = np.maximum.accumulate(whole.starts)
        pieces = [len(piece.text) for piece in cut([text], PIECE_CHARS)]
        rule, chars, expected = SplitRule(PIECE_CHARS, period), 0, {TRAIN: 0, VALIDATION: 0}
        for number, length in enumerate(pieces):
            last = np.searchsorted(starts, chars + length) if number < len(pieces) - 1 else len(starts)
            expected[rule.split_of(number)] += last - np.searchsorted(starts, chars)
            chars += length
        found = {TRAIN: 0, VALIDATION: 0}
        for part in parts:
            assert len({segment.split for segment in part.segments}) == 1
            found[part.segments[0].split] += len(part.tokens)
        assert found == expected


def check(seed: int, folder: Path) -> None:
    generator = random.Random(seed)
    tokenizer = random_tokenizer(generator, KINDS[seed % len(KINDS)], folder)
    for num_chars in (4000, 30_000):
        assert_whole(tokenizer, random_text(generator, num_chars))


@pytest.mark.parametrize("seed", range(12))
def test_documents_keep_their_tokens(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_documents_keep_their_tokens_with_fifty_tokenizers(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


def words_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE, whose words are encoded by themselves."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["hello world, and more of it"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder)


def test_a_long_document_is_not_encoded_as_one(tmp_path: Path) -> None:
    tokenizer = words_tokenizer(tmp_path)
    text = "".join(f"hello world {number}\n" for number in range(2000))
    parts = parts_of(tokenizer, [text, "hello", text[:7000]], period=0)
    assert max(sum(len(segment.text) for segment in part.segments) for part in parts) <= 2048 * 5 // 4
    by_document = [[part for part in parts if part.segments[0].document == number] for number in range(3)]
    for found, whole in zip(by_document, [text, "hello", text[:7000]], strict=True):
        assert np.concatenate([part.tokens for part in found]).tolist() == tokenizer.encode(whole)


@pytest.mark.parametrize("run", ["a", "ab", " ", "漢"])
def test_where_no_cut_can_be_proved_windows_are_joined(run: str, tmp_path: Path) -> None:
    """Pairs in a run are made from its beginning on, which is out of sight."""
    pieces = ["a", "b", " ", "aa", "aaa", "ab", "abab", "  ", "   ", "<unk>"]
    merges = [("a", "a"), ("aa", "a"), ("a", "b"), ("ab", "ab"), (" ", " "), ("  ", " ")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    hf.Tokenizer(hf.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True)).save(
        str(tmp_path / "tokenizer.json")
    )
    tokenizer = HuggingFaceTokenizer(tmp_path)
    for text in (run * 9001, "ab" * 3000 + run * 9001 + "ba" * 3000):
        assert_whole(tokenizer, text)


def test_bytes(tmp_path: Path) -> None:
    assert_whole(BytesTokenizer(), random_text(random.Random(0), 30_000))


def test_an_error_of_the_tokenizer_arrives(tmp_path: Path) -> None:
    hf.Tokenizer(hf.models.Unigram([("a", -1.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="cannot encode the corpus"):
        parts_of(HuggingFaceTokenizer(tmp_path), ["a" * 7000, "b"])
