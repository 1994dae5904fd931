"""Special tokens: who defines them, which of them a text can become, and how often one is spelled."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers as hf
import transformers

from tests.unit.data.torchtitan_assets import BOS, EOS, write_debug_tokenizer
from titan_growth.data.special_tokens import SpellingCounter
from titan_growth.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from titan_growth.tools.errors import DataError

LETTERS = {letter: number for number, letter in enumerate("ab<>/s| ", start=1)}


@pytest.fixture
def debug(tmp_path: Path) -> Path:
    return write_debug_tokenizer(tmp_path / "debug")


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tokens_of_tokenizer_config_are_added_as_transformers_adds_them(debug: Path) -> None:
    flags = {"lstrip": True, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    table = json.loads((debug / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    configure(debug, added_tokens_decoder={**table, "9": {"content": "qqq", **flags}})
    ours, theirs = load_tokenizer(debug), transformers.AutoTokenizer.from_pretrained(debug)
    allowing = load_tokenizer(debug, allow_special_tokens=True)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (BOS + 1, EOS + 1)
    assert ours.vocab_size == len(theirs) == 2005
    text = "a  qqq b<|eos|> <|image|>"
    assert allowing.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.encode("a  qqq b") == allowing.encode("a  qqq b")
    assert ours.decode(ours.encode(text)) == text.replace("  qqq", "qqq")


def test_the_torchtitan_folder_and_its_copy(debug: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(debug)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2004, BOS, EOS)
    (tmp_path / "copy").mkdir()
    for name, content in tokenizer.files().items():
        (tmp_path / "copy" / name).write_bytes(content)
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint(), copy.bos_id, copy.eos_id) == (tokenizer.fingerprint(), BOS, EOS)


def test_the_fingerprint_covers_what_decides_tokens(debug: Path) -> None:
    def changed(**changes: Any) -> str:
        before = (debug / "tokenizer_config.json").read_bytes()
        configure(debug, **changes)
        fingerprint = load_tokenizer(debug).fingerprint()
        (debug / "tokenizer_config.json").write_bytes(before)
        return fingerprint

    table = json.loads((debug / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    same = changed(chat_template="x")
    assert same == changed()
    others = [
        changed(added_tokens_decoder={**table, "3": {"content": "zz"}}),
        changed(added_tokens_decoder={**table, "3": {"content": "zz", "lstrip": True}}),
        changed(added_tokens_decoder={**table, "3": {"content": "ab"}}),
        changed(bos_token="<|eos|>"),
    ]
    assert len({same, *others}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bos_token": ["<|bos|>"]},
            r'config\.json: its bos_token is \["<\|bos\|>"\], not the text of a token\. Repair',
        ),
        ({"bos_token": {"special": True}}, r"its bos_token is .*not the text of a token"),
        ({"eos_token": ""}, r'its eos_token is "", not the text of a token'),
        ({"added_tokens_decoder": []}, r"its added_tokens_decoder is no JSON object"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, r"added_tokens_decoder\['x'\] is not an id with a token"),
        ({"added_tokens_decoder": {"1": {}}}, r"added_tokens_decoder\['1'\] is \{\}, not the text of a token"),
        ({"added_tokens_decoder": {"1": {"content": "y", "special": 1}}}, r"has a flag that is not true or false"),
        (
            {"bos_token": "<nope>"},
            r"its bos_token '<nope>' is not in tokenizer\.json, and no added_tokens_decoder defines",
        ),
    ],
)
def test_what_is_no_token_is_refused_in_one_line(debug: Path, changes: dict[str, Any], message: str) -> None:
    configure(debug, **changes)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(debug)
    assert "\n" not in str(caught.value)


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_panics_of_the_library_are_one_line_each(debug: Path) -> None:
    template = {"SpecialToken": {"id": "x", "type_id": 0}}
    edit(debug, post_processor={"type": "TemplateProcessing", "single": [template], "pair": [], "special_tokens": {}})
    assert load_tokenizer(debug).encode("ab")  # what it would add is not asked for
    charsmap = base64.b64encode(b"abc").decode()
    edit(debug, normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})
    with pytest.raises(
        DataError, match=r"not a Hugging Face tokenizer\.json \(Precompiled: .*\)\. Name one written by"
    ):
        load_tokenizer(debug)


def test_a_text_that_cannot_be_encoded_is_one_line(tmp_path: Path) -> None:
    tokenizer = hf.Tokenizer(hf.models.Unigram([("a", -1.0)]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"cannot encode the corpus \(.*unk_id. is missing\)"):
        load_tokenizer(tmp_path).encode("b")


def test_dropout_is_left_out(debug: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = load_tokenizer(debug).encode("abababab" * 20)
    edit(debug, model={**json.loads((debug / "tokenizer.json").read_text())["model"], "dropout": 0.5})
    assert load_tokenizer(debug).encode("abababab" * 20) == expected
    assert "its dropout is left out" in caplog.text


def model_that_spells(kind: str) -> hf.Tokenizer:
    """A tokenizer whose model has "</s>" among its pieces, so that it needs no declaration to become EOS."""
    if kind == "unigram":
        pieces = [("<unk>", 0.0), *((letter, -2.0) for letter in LETTERS), ("</s>", 0.0), ("ab", -1.0)]
        return hf.Tokenizer(hf.models.Unigram(pieces, unk_id=0))
    vocabulary = {"<unk>": 0, **LETTERS, "</": 9, "s>": 10, "</s>": 11, "ab": 12}
    if kind == "bpe":
        merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("a", "b")]
        return hf.Tokenizer(hf.models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer = hf.Tokenizer(hf.models.WordLevel({**vocabulary, "ab": 12}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("is_declared", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordlevel"])
def test_no_text_becomes_eos_unless_allowed(kind: str, is_declared: bool, tmp_path: Path) -> None:
    tokenizer = model_that_spells(kind)
    if is_declared:
        tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["|ab|"])  # behind the special ones, and no special token itself
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain, allowing = (HuggingFaceTokenizer(tmp_path, allow_special_tokens=allow) for allow in (False, True))
    assert plain.eos_id == allowing.eos_id == tokenizer.token_to_id("</s>")
    text = "ab </s> ab|ab|"
    assert plain.eos_id not in plain.encode(text)
    assert allowing.encode(text).count(plain.eos_id) == 1
    assert plain.encode(text)[-1] == allowing.encode(text)[-1] == tokenizer.token_to_id("|ab|")
    assert plain.encode("ab ab|ab|") == allowing.encode("ab ab|ab|") == tokenizer.encode("ab ab|ab|").ids
    assert [one.ids for one in plain.encode_with_starts([text])] == [plain.encode(text)]
    assert plain.fingerprint() == allowing.fingerprint()
    assert plain.decode([plain.eos_id]) == "</s>"
    assert "</s>" in plain.special_texts


def train_model(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world </s> <s> <x>"] * 20),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_control_symbols_of_sentencepiece_come_from_no_text(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(train_model(tmp_path / "t.model", control_symbols=["<x>"]))
    ids = tokenizer.encode("a </s> <s> <x>")
    assert not {1, 2, 3} & set(ids)
    assert tokenizer.decode(ids) == "a </s> <s> <x>"
    assert tokenizer.special_texts == ("</s>", "<s>", "<x>")


def test_user_defined_symbols_of_sentencepiece_are_text(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(train_model(tmp_path / "t.model", user_defined_symbols=["<x>", "</s>"]))
    ids = tokenizer.encode("a </s> <x>")
    assert tokenizer.decode(ids) == "a </s> <x>"
    assert {tokenizer.decode([token]) for token in ids} >= {"</s>", "<x>"}
    assert tokenizer.eos_id is None  # the library has no EOS that is text
    assert tokenizer.special_texts == ("<s>",)


def test_spellings_are_counted_alike_however_a_document_is_divided() -> None:
    generator = random.Random(0)
    counter = SpellingCounter(["<a>", "<a><b>", "aa"])
    assert counter.count("<a><b> <a> aaa aaaa", "") == 5
    for _ in range(200):
        text = "".join(generator.choice("<ab>") for _ in range(40))
        counter.begin()
        expected = counter.count(text, "")
        cuts = sorted(generator.sample(range(1, 40), 4))
        parts = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, 40], strict=True)]
        counter.begin()
        counts = [counter.count(part, "".join(parts[number + 1 :])) for number, part in enumerate(parts)]
        assert sum(counts) == expected
    assert SpellingCounter([]).count("<a>", "") == 0
