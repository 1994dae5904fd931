"""Tokenizers and texts drawn at random, of every kind that there is, to test a property of all tokenizers."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers as hf
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from titan_growth.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

KINDS = ("bpe", "unigram", "wordpiece", "wordlevel", "sentencepiece bpe", "sentencepiece unigram")
_GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

NORMALIZERS: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: None,
    normalizers.NFKC,
    lambda: normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    lambda: normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    lambda: normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]),
    lambda: normalizers.BertNormalizer(lowercase=True),
)
PRE_TOKENIZERS: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    lambda: pre_tokenizers.Metaspace(prepend_scheme="always"),
    lambda: pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    lambda: pre_tokenizers.Metaspace(prepend_scheme="never"),
    pre_tokenizers.Whitespace,
    pre_tokenizers.WhitespaceSplit,
    pre_tokenizers.BertPreTokenizer,
    pre_tokenizers.UnicodeScripts,
    lambda: pre_tokenizers.CharDelimiterSplit("\n"),
    lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.Punctuation("contiguous")]),
    lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_GPT4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    lambda: pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "merged_with_previous"), pre_tokenizers.Digits()]),
)


def random_text(generator: random.Random, num_chars: int) -> str:
    """Words, runs of one character, a very long word, numbers, accents, other scripts, and special tokens spelled."""
    words = ["".join(generator.choices("aeinrst", k=generator.randint(1, 9))) for _ in range(40)]
    words += [
        "É",
        "é",
        "naïve",
        "e\u0301",
        "漢字",
        "ﬁne",
        "Ω",
        "👩‍🚀",
        "1234567",
        "3.14",
        "<s>",
        "</s>",
        "<|x|>",
        "_-_",
    ]
    separators = [" "] * 12 + ["\n", "\n\n", "  ", "\t", "", ", ", "    ", "\r\n"]
    parts: list[str] = []
    while sum(map(len, parts)) < num_chars:
        kind = generator.random()
        if kind < 0.002:
            parts.append(generator.choice("a \n=é漢") * generator.randint(50, 3000))
        elif kind < 0.003:
            parts.append("".join(generator.choices("abc", k=generator.randint(100, 2000))))
        parts.append(generator.choice(words) + generator.choice(separators))
    return "".join(parts)[:num_chars]


def random_tokenizer(generator: random.Random, kind: str, folder: Path) -> Tokenizer:
    """A tokenizer trained on a random text."""
    lines = [line for line in random_text(generator, 8000).splitlines() if line.strip()]
    if kind.startswith("sentencepiece"):
        return _sentencepiece(generator, kind.split()[1], lines, folder)
    tokenizer, trainer = _model(generator, kind)
    if normalizer := generator.choice(NORMALIZERS)():
        tokenizer.normalizer = normalizer
    if pre_tokenizer := generator.choice(PRE_TOKENIZERS)():
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(lines, trainer)
    if generator.random() < 0.5:
        tokenizer.add_tokens([AddedToken("rst", lstrip=generator.random() < 0.5, rstrip=generator.random() < 0.5)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder, allow_special_tokens=generator.random() < 0.5)


def _model(generator: random.Random, kind: str) -> Any:
    special: dict[str, Any] = {"special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    if kind == "bpe":
        options = {"fuse_unk": generator.random() < 0.5, "byte_fallback": generator.random() < 0.5}
        trainer: Any = trainers.BpeTrainer(vocab_size=generator.choice([200, 600]), **special)
        return hf.Tokenizer(models.BPE(unk_token="<unk>", **options)), trainer
    if kind == "unigram":
        return hf.Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **special)
    if kind == "wordpiece":
        longest = generator.choice([20, 1000])
        model = models.WordPiece(unk_token="<unk>", max_input_chars_per_word=longest)
        return hf.Tokenizer(model), trainers.WordPieceTrainer(vocab_size=300, **special)
    return hf.Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(vocab_size=60, **special)


def _sentencepiece(generator: random.Random, kind: str, lines: list[str], folder: Path) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name=generator.choice(["identity", "nmt_nfkc", "nmt_nfkc_cf"]),
        add_dummy_prefix=generator.random() < 0.7,
        remove_extra_whitespaces=generator.random() < 0.5,
        split_by_whitespace=generator.random() < 0.7,
        treat_whitespace_as_suffix=generator.random() < 0.3,
        allow_whitespace_only_pieces=generator.random() < 0.5,
        user_defined_symbols=generator.choice([[], ["\n", "\t"]]),
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return SentencePieceTokenizer(folder / "tokenizer.model")
