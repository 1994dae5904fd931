"""Tokenizers of Hugging Face's `tokenizers` library: a `tokenizer.json` and the files beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from titan_growth.data.readers import reading
from titan_growth.data.special_tokens import COMPANIONS, Companions
from titan_growth.data.tokenizer import Encoded, Tokenizer, library_errors
from titan_growth.tools.errors import DataError
from titan_growth.tools.logs import logger

JSON_NAME = "tokenizer.json"
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]")
_UNSPELLABLE = "\U0010fffe"  # never a character of a text, by Unicode's promise


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, given as the file or its folder.

    BOS and EOS are those that tokenizer_config.json or special_tokens_map.json beside it name, else well-known names
    in the vocabulary, else None. The tokens of tokenizer_config.json's `added_tokens_decoder` are added as
    `transformers` adds them. Raises DataError if a file is missing or damaged.
    """

    def __init__(self, path: str | Path, *, allow_special_tokens: bool = False) -> None:
        path = Path(path)
        self._path = path / JSON_NAME if path.is_dir() else path
        self.name = f"huggingface {self._path}"
        self.allows_special_tokens = allow_special_tokens
        with reading(self._path):
            self._files = {JSON_NAME: self._path.read_bytes()}
            for name in COMPANIONS:
                if (self._path.parent / name).is_file():
                    self._files[name] = (self._path.parent / name).read_bytes()
        companions = Companions(self._path.parent, self._files)
        self._tokenizer = self._loaded(self._files[JSON_NAME])
        self._added = self._missing_tokens(companions)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # What decides the tokens of a text that spells none, for the fingerprint.
        self._decisive = [
            token
            for token in self._added
            if allow_special_tokens or not token.special or token.content not in vocabulary
        ]
        self._add(self._tokenizer, self._added)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_id = self._special("bos_token", _USUAL_BOS, vocabulary, companions)
        self.eos_id = self._special("eos_token", _USUAL_EOS, vocabulary, companions)
        self._has_scores = isinstance(self._tokenizer.model, tokenizers.models.Unigram)
        self._encoder = self._tokenizer
        self._true_ids: dict[int, int] = {}
        self.special_texts = self._prepare_special_texts(vocabulary)

    def _loaded(self, data: bytes) -> Any:
        with library_errors(self._path, "not a Hugging Face tokenizer.json", "Name one written by `tokenizers`"):
            tokenizer: Any = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.post_processor = None  # what it adds is not wanted, and it moves the places of tokens
            if getattr(tokenizer.model, "dropout", None):
                logger.warning("%s: its dropout is left out, so that a text has one encoding", self._path)
                tokenizer.model.dropout = None
            return tokenizer

    def _missing_tokens(self, companions: Companions) -> list[Any]:
        """Tokens that tokenizer_config.json adds to tokenizer.json, or whose flags it changes."""
        present = {repr(token) for token in self._tokenizer.get_added_tokens_decoder().values()}
        roles = {companions.role(role).text for role in ("bos_token", "eos_token")}
        found = []
        for entry in companions.added_tokens():
            token = tokenizers.AddedToken(**entry)
            if repr(token) in present:
                continue
            token.special = token.special or token.content in roles
            found.append(token)
        return found

    def _add(self, tokenizer: Any, tokens: list[Any]) -> None:
        with library_errors(self._path, "tokens of the files beside it cannot be added", "Use matching files"):
            tokenizer.add_tokens(tokens)

    def _special(
        self, role: str, usual_names: tuple[str, ...], vocabulary: dict[str, int], companions: Companions
    ) -> int | None:
        named = companions.role(role)
        if named.text is not None and named.text not in vocabulary:
            raise DataError(
                f"{named.where}: its {role} {named.text!r} is not in {self._path.name}, and no added_tokens_decoder "
                "defines it. Use matching files"
            )
        if named.is_named:
            return vocabulary[named.text] if named.text is not None else None
        return next((vocabulary[token] for token in usual_names if token in vocabulary), None)

    def _prepare_special_texts(self, vocabulary: dict[str, int]) -> tuple[str, ...]:
        """The special tokens; from here on, texts are encoded to them or not, as is wanted."""
        added = self._tokenizer.get_added_tokens_decoder()
        roles = [token for token in (self.bos_id, self.eos_id) if token is not None]
        names = {token: name for name, token in vocabulary.items() if token in roles}
        undeclared = [tokenizers.AddedToken(names[token], special=True) for token in roles if token not in added]
        self._add(self._tokenizer, undeclared)
        special = {token.content for token in added.values() if token.special} | set(names.values())
        if self.allows_special_tokens:
            return tuple(sorted(special))
        if plain := _without_spellings(json.loads(self._files[JSON_NAME]), special):
            # The model itself spells some, whatever is declared special.
            self._encoder = self._loaded(json.dumps(plain).encode())
            self._add(self._encoder, [*self._added, *undeclared])
            true = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}
            ours = self._encoder.get_added_tokens_decoder().items()
            self._true_ids = {number: true[token.content] for number, token in ours if number != true[token.content]}
        self._encoder.encode_special_tokens = True
        return tuple(sorted(special))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # Without offsets, where the library can.
        encode = getattr(self._encoder, "encode_batch_fast", self._encoder.encode_batch)
        with self._encoding():
            return [self._true(encoding.ids) for encoding in encode(texts, add_special_tokens=False)]

    def encode_with_starts(self, texts: list[str]) -> list[Encoded]:
        with self._encoding():
            encodings = self._encoder.encode_batch(texts, add_special_tokens=False)
            return [
                Encoded(
                    self._true(one.ids), [start for start, _ in one.offsets], one.word_ids if self._has_scores else None
                )
                for one in encodings
            ]

    def _encoding(self) -> Any:
        fix = "Its vocabulary may lack an unknown token; use a byte-level tokenizer"
        return library_errors(self._path, "cannot encode the corpus", fix)

    def _true(self, ids: list[int]) -> list[int]:
        if self._true_ids.keys().isdisjoint(ids):
            return ids
        return [self._true_ids.get(token, token) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.bos_id} {self.eos_id}\n".encode() + self._files[JSON_NAME])
        for token in self._decisive:
            flags = [token.single_word, token.lstrip, token.rstrip, token.normalized, token.special]
            digest.update(json.dumps([token.content, *flags]).encode())
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        return dict(self._files)


_OTHER_WAYS_TO_WHOLE_WORDS = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
"""Settings of a BPE with which a token may come about that no pair of the merges spells."""


def _without_spellings(table: dict[str, Any], special: set[str]) -> dict[str, Any] | None:
    """A tokenizer.json whose model makes none of the special tokens out of a text; None if it makes none anyway.

    Declared special tokens are looked for before the model sees a text, and can be switched off there. The vocabulary
    of a Unigram, WordPiece or WordLevel model has them all the same, as has that of a BPE whose merges lead to one.
    """
    model = table["model"]
    vocabulary = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    hidden = special - {model.get("unk_token")}
    if pairs and not any(model.get(key) for key in _OTHER_WAYS_TO_WHOLE_WORDS):
        made = {"".join(pair) for pair in pairs}
        hidden = {name for name in hidden if name in made or len(name) == 1}
    if isinstance(vocabulary, list):
        hidden = {entry[0] for number, entry in enumerate(vocabulary) if number != model.get("unk_id")} & hidden
        model["vocab"] = [[_UNSPELLABLE + name if name in hidden else name, score] for name, score in vocabulary]
    else:
        hidden &= vocabulary.keys()
        model["vocab"] = {_UNSPELLABLE + name if name in hidden else name: token for name, token in vocabulary.items()}
    if not hidden:
        return None
    if "merges" in model:
        model["merges"] = [pair for pair in pairs if not hidden & {*pair, "".join(pair)}]
    return table
