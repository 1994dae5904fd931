"""Tokenizers: SentencePiece models, Hugging Face `tokenizer.json` files and plain bytes.

If the recipe names none, a SentencePiece model is trained on the corpus (`tokenizer_training`) and cached. `encode`
adds no special tokens; preparation puts BOS and EOS where documents begin and end.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_growth.data.content import ContentHashes
from titan_growth.data.corpus import Corpus
from titan_growth.data.readers import reading
from titan_growth.data.remote import Remote, fetch, place_of
from titan_growth.data.storage import cache_root, exclusive, writing
from titan_growth.data.tokenizer_training import TRAINER_VERSION, train_sentencepiece
from titan_growth.tools.errors import DataError
from titan_growth.tools.files import write_atomic

_MODEL_NAME, _JSON_NAME, _BYTES_NAME = "tokenizer.model", "tokenizer.json", "tokenizer.bytes"
_NAMES_IN_FOLDER = {
    "auto": (_JSON_NAME, _MODEL_NAME, _BYTES_NAME),
    "sentencepiece": (_MODEL_NAME,),
    "huggingface": (_JSON_NAME,),
    "bytes": (_BYTES_NAME,),
}
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]")


class Tokenizer(abc.ABC):
    """Text to token ids and back."""

    name: str
    """For logs."""
    vocab_size: int
    """One more than the largest token id."""
    bos_id: int | None
    """Token that begins a document, if there is one."""
    eos_id: int | None
    """Token that ends a document, if there is one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on the library's threads."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Name -> content of the files from which `load_tokenizer`, given their folder, makes this tokenizer."""

    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer's definition."""
        (content,) = self.files().values()
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class TokenizerSpec:
    """The recipe's tokenizer.

    kind: "auto" (by the path's extension), "sentencepiece", "huggingface" or "bytes".
    path: a .model file, a tokenizer.json, or a folder with one, as a path or URL; None: in hf_assets_path, else train.
    hf_assets_path: path or URL of a Hugging Face folder with tokenizer.json or tokenizer.model.
    vocab_size: the model's. The tokenizer's must not be larger; a trained one gets exactly this size.
    """

    kind: str = "auto"
    path: str | None = None
    hf_assets_path: str | None = None
    vocab_size: int = 2048


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as tokens 0..255, BOS (256), EOS (257). Decoding drops both and replaces invalid UTF-8."""

    name = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        return {_BYTES_NAME: b"one token per UTF-8 byte, bos 256, eos 257\n"}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. Raises DataError if it is missing or not one."""

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self._path = Path(path)
        with reading(self._path):
            self._model = self._path.read_bytes()
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{self._path}: not a SentencePiece model. Name a .model file that was written by sentencepiece"
            ) from error
        self.name = f"sentencepiece {self._path.name}"
        self.vocab_size = self._processor.piece_size()
        special = (self._processor.bos_id(), self._processor.eos_id())
        self.bos_id, self.eos_id = (token if token >= 0 else None for token in special)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return list(self._processor.encode(texts)) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(token) for token in ids]))

    def files(self) -> dict[str, bytes]:
        return {_MODEL_NAME: self._model}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, given as the file or its folder.

    BOS and EOS are those that tokenizer_config.json or special_tokens_map.json beside it name, else well-known names
    in the vocabulary, else None. Raises DataError if a file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        path = Path(path)
        self._path = path / _JSON_NAME if path.is_dir() else path
        with reading(self._path):
            self._files = {_JSON_NAME: self._path.read_bytes()}
            for name in _COMPANIONS:
                if (self._path.parent / name).is_file():
                    self._files[name] = (self._path.parent / name).read_bytes()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(self._files[_JSON_NAME].decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self._path}: not a Hugging Face tokenizer.json ({reason}). Name one written by `tokenizers`"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = f"huggingface {self._path}"
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_id = self._special("bos_token", _USUAL_BOS, vocabulary)
        self.eos_id = self._special("eos_token", _USUAL_EOS, vocabulary)

    def _special(self, role: str, usual_names: tuple[str, ...], vocabulary: dict[str, int]) -> int | None:
        named_by_a_file = False
        for name in _COMPANIONS:
            if name not in self._files:
                continue
            where = self._path.parent / name
            try:
                settings = json.loads(self._files[name])
            except ValueError as error:
                raise DataError(f"{where}: broken JSON ({error}). Repair or remove the file") from error
            if not isinstance(settings, dict):
                raise DataError(f"{where}: not a JSON object. Repair or remove the file")
            named_by_a_file = named_by_a_file or role in settings
            token = settings.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                if token not in vocabulary:
                    raise DataError(f"{where}: its {role} {token!r} is not in {self._path.name}. Use matching files")
                return vocabulary[token]
        if named_by_a_file:
            return None  # a file says null
        return next((vocabulary[token] for token in usual_names if token in vocabulary), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{self._path}: cannot encode the corpus ({' '.join(str(error).split())[:200]}). "
                "Its vocabulary may lack an unknown token; use a byte-level tokenizer"
            ) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.bos_id} {self.eos_id}\n".encode() + self._files[_JSON_NAME]).hexdigest()

    def files(self) -> dict[str, bytes]:
        return dict(self._files)


def load_tokenizer(path: str | Path, kind: str = "auto") -> Tokenizer:
    """The tokenizer in a file or folder; "auto" goes by file names. Raises DataError."""
    _check_kind(kind)
    path = Path(path).expanduser()
    with reading(path):
        is_folder, exists = path.is_dir(), path.exists()
    if not exists:
        raise DataError(f"tokenizer {path}: does not exist. Check the path")
    if is_folder:
        found = [path / name for name in _NAMES_IN_FOLDER[kind] if (path / name).is_file()]
        if not found:
            wanted = " or ".join(_NAMES_IN_FOLDER[kind][:2])
            raise DataError(f"tokenizer {path}: the folder holds no {wanted}. Name a folder or a file that has one")
        path = found[0]
    if kind == "sentencepiece" or (kind == "auto" and path.suffix == ".model"):
        return SentencePieceTokenizer(path)
    if kind == "huggingface" or (kind == "auto" and path.suffix == ".json"):
        return HuggingFaceTokenizer(path)
    if kind == "bytes" or path.name == _BYTES_NAME:
        return BytesTokenizer()
    raise DataError(
        f"tokenizer {path}: its kind cannot be told from its name. "
        'Use a .model or .json file, or set the kind to "sentencepiece" or "huggingface"'
    )


def load_or_train(spec: TokenizerSpec, corpus: Corpus, cache_dir: Path | None) -> Tokenizer:
    """The recipe's tokenizer; without a path, one trained on the corpus and cached.

    Raises DataError if it cannot be loaded or trained, or if its vocabulary is larger than `spec.vocab_size`.
    """
    _check_kind(spec.kind)
    tokenizer: Tokenizer
    source = spec.path or spec.hf_assets_path
    if spec.kind == "bytes":
        tokenizer = BytesTokenizer()
    elif source is not None:
        key = "data.tokenizer_path" if spec.path else "model.hf_assets_path"
        tokenizer = _load(key, source, spec.kind, cache_dir)
    elif spec.kind == "huggingface":
        raise DataError('tokenizer kind "huggingface": needs a tokenizer.json. Set its path or hf_assets_path')
    else:
        tokenizer = _trained(spec.vocab_size, corpus, cache_dir)
    if tokenizer.vocab_size > spec.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name}: it has {tokenizer.vocab_size:,} tokens, more than the model's vocabulary of "
            f"{spec.vocab_size:,}. Raise the model's vocab_size or use a smaller tokenizer"
        )
    return tokenizer


def _load(key: str, source: str, kind: str, cache_dir: Path | None) -> Tokenizer:
    """From a path, or from the cached copy of a URL."""
    place = place_of(key, source)
    if not isinstance(place, Remote):
        return load_tokenizer(place, kind)
    with reading(place):
        copy = fetch(place, _NAMES_IN_FOLDER[kind], _COMPANIONS, cache_root(cache_dir) / "tokenizers")
    try:
        tokenizer = load_tokenizer(copy, kind)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer):
        tokenizer.name = f"{tokenizer.name.split()[0]} {place.url}"  # not the copy's
    return tokenizer


def _trained(vocab_size: int, corpus: Corpus, cache_dir: Path | None) -> Tokenizer:
    root = cache_root(cache_dir)
    folder = root / "tokenizers"
    facts = f"{TRAINER_VERSION} {vocab_size} {corpus.fingerprint(ContentHashes(root))}"
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.model"
    if not path.is_file():
        with exclusive(path.with_suffix(".lock"), "training the tokenizer"):
            if not path.is_file():
                model = train_sentencepiece(corpus, vocab_size)
                with writing(path):
                    write_atomic(path, model)
    return SentencePieceTokenizer(path)


def _check_kind(kind: str) -> None:
    if kind not in _NAMES_IN_FOLDER:
        raise DataError(f"tokenizer kind {kind!r}: unknown. Use one of {', '.join(_NAMES_IN_FOLDER)}")
