"""Converts our tokenizers to a `tokenizer.json` of Hugging Face's `tokenizers`, where an equivalent exists.

A sentencepiece BPE with byte fallback and no text normalisation (what a run trains on its corpus) has an exact
counterpart: its pieces, the merges their scores imply, and its own symbols as added tokens. This is verified: both
encode a few difficult texts, and one difference is enough to give up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from titan_growth.data.tokenizers import SentencePieceTokenizer, Tokenizer

_SPACE = "\u2581"
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_DIFFICULT = (
    "",
    " ",
    "a",
    "  two spaces, then\tone tab\n\n and a blank line \n",
    "def f(x):\n    return x ** 2 + 10_000 / 3.14159  # gr\u00f6\u00dfer\r\n",
    "\u00c0 quoi bon? \u4f60\u597d\uff0c\u4e16\u754c \U0001f9ea\U0001f468\u200d\U0001f469 \u0644\u0627 e\u0301",
    "The quick brown fox jumps over the lazy dog, 1234567890 times;\nthe dog does not care at all.",
    "is no end, nor is [INST] or <0x41>",
)


@dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer in Hugging Face's format."""

    text: str
    """Content of tokenizer.json."""
    special_tokens: dict[str, str]
    """By key of tokenizer_config.json."""


def of_sentencepiece(tokenizer: SentencePieceTokenizer, *, adds_bos: bool) -> TokenizerJson | None:
    """The counterpart of a sentencepiece model, or None if none encodes the same.

    Args:
        adds_bos: whether it puts BOS before a text, as in training.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders, normalizers
    from tokenizers import Tokenizer as Tokenizers
    from tokenizers.models import BPE

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(next(iter(tokenizer.files().values())))
    spec = model.normalizer_spec
    if model.trainer_spec.model_type != _BPE or spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        return None
    names = [piece.piece for piece in model.pieces]
    unknown = next((piece.piece for piece in model.pieces if piece.type == _UNKNOWN), None)
    made = Tokenizers(
        BPE(
            {name: token for token, name in enumerate(names)},
            _merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for types, add, special in (
        ((_UNKNOWN, _CONTROL), made.add_special_tokens, True),
        ((_USER_DEFINED,), made.add_tokens, False),
    ):
        add([AddedToken(one.piece, normalized=False, special=special) for one in model.pieces if one.type in types])
    symbols = {"unk_token": unknown} if unknown is not None else {}
    for key, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token is not None:
            symbols[key] = names[token]
    return _finished(made, tokenizer, symbols, adds_bos)


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Every split of a piece into two others, best piece first: the merges that sentencepiece does."""
    ids = {piece.piece: token for token, piece in enumerate(pieces)}
    found = []
    for piece in pieces:
        if piece.type != _NORMAL:
            continue
        name = piece.piece
        splits = [(name[:at], name[at:]) for at in range(1, len(name))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-piece.score, pair) for pair in known]
    found.sort(key=lambda entry: entry[0])  # stable: pairs of one piece stay together
    return [pair for _, pair in found]


def of_bytes(tokenizer: Tokenizer, *, adds_bos: bool) -> TokenizerJson | None:
    """The counterpart of the bytes tokenizer: a BPE of nothing but byte-fallback tokens."""
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Tokenizers
    from tokenizers.models import BPE

    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {special["bos_token"]: tokenizer.bos_id, special["eos_token"]: tokenizer.eos_id}
    made = Tokenizers(BPE(vocabulary, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special.values()])
    return _finished(made, tokenizer, special, adds_bos)


def _finished(made: Any, original: Tokenizer, special: dict[str, str], adds_bos: bool) -> TokenizerJson | None:
    from tokenizers.processors import TemplateProcessing

    if made.get_vocab_size(with_added_tokens=True) != original.vocab_size:
        return None
    for text in _DIFFICULT:
        if made.encode(text, add_special_tokens=False).ids != original.encode(text):
            return None
    if adds_bos and original.bos_id is not None:
        bos = special["bos_token"]
        made.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, original.bos_id)]
        )
    return TokenizerJson(made.to_str(pretty=True), special)
