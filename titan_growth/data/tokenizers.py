"""The tokenizer that a recipe names: loaded from its path or URL, or trained on the corpus.

If the recipe names none, a SentencePiece model is trained on the corpus (`tokenizer_training`) and cached. The kinds
are in modules of their own. `encode` adds no special tokens: preparation puts BOS and EOS at the ends of documents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from titan_growth.data.content import ContentHashes
from titan_growth.data.corpus import Corpus
from titan_growth.data.hugging_face import JSON_NAME, HuggingFaceTokenizer
from titan_growth.data.readers import reading
from titan_growth.data.remote import Remote, fetch, place_of
from titan_growth.data.sentence_piece import MODEL_NAME, SentencePieceTokenizer
from titan_growth.data.special_tokens import COMPANIONS
from titan_growth.data.storage import cache_root, exclusive, writing
from titan_growth.data.tokenizer import BYTES_NAME, BytesTokenizer, Tokenizer
from titan_growth.data.tokenizer_training import TRAINER_VERSION, train_sentencepiece
from titan_growth.tools.errors import DataError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.location import local_path
from titan_growth.tools.logs import logger

_NAMES_IN_FOLDER = {
    "auto": (JSON_NAME, MODEL_NAME, BYTES_NAME),
    "sentencepiece": (MODEL_NAME,),
    "huggingface": (JSON_NAME,),
    "bytes": (BYTES_NAME,),
}


@dataclass(frozen=True)
class TokenizerSpec:
    """The recipe's tokenizer.

    kind: "auto" (by the path's extension), "sentencepiece", "huggingface" or "bytes".
    path: a .model file, a tokenizer.json, or a folder with one, as a path or URL; None: in hf_assets_path, else train.
    hf_assets_path: path or URL of a Hugging Face folder with tokenizer.json or tokenizer.model.
    vocab_size: the model's. The tokenizer's must not be larger; a trained one gets exactly this size.
    allow_special_tokens: a text that spells a special token is encoded to it.
    """

    kind: str = "auto"
    path: str | None = None
    hf_assets_path: str | None = None
    vocab_size: int = 2048
    allow_special_tokens: bool = False

    @property
    def source(self) -> str | None:
        """The path or URL that it is loaded from, if it is."""
        return None if self.kind == "bytes" else self.path or self.hf_assets_path


def load_tokenizer(path: str | Path, kind: str = "auto", *, allow_special_tokens: bool = False) -> Tokenizer:
    """The tokenizer in a file or folder; "auto" goes by file names. Raises DataError."""
    _check_kind(kind)
    path = local_path(path)
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
        return HuggingFaceTokenizer(path, allow_special_tokens=allow_special_tokens)
    if kind == "bytes" or path.name == BYTES_NAME:
        return BytesTokenizer()
    raise DataError(
        f"tokenizer {path}: its kind cannot be told from its name. "
        'Use a .model or .json file, or set the kind to "sentencepiece" or "huggingface"'
    )


def load_or_train(spec: TokenizerSpec, corpus: Corpus, cache_dir: Path | None) -> Tokenizer:
    """The recipe's tokenizer; without a path, one trained on the corpus and cached.

    Raises DataError if it cannot be loaded or trained, or if its vocabulary is larger than `spec.vocab_size`.
    """
    tokenizer = load_named(spec, cache_dir) or _trained(spec.vocab_size, corpus, cache_dir)
    if spec.allow_special_tokens and not tokenizer.allows_special_tokens:
        logger.warning(
            "data.allow_special_tokens has no effect: tokenizer %s makes no special token of any text", tokenizer.name
        )
    return tokenizer


def load_named(spec: TokenizerSpec, cache_dir: Path | None) -> Tokenizer | None:
    """The recipe's tokenizer if it needs no corpus, else None. Raises DataError like `load_or_train`."""
    _check_kind(spec.kind)
    tokenizer: Tokenizer
    if spec.kind == "bytes":
        tokenizer = BytesTokenizer()
    elif spec.source is not None:
        tokenizer = _load(spec, spec.source, cache_dir)
    elif spec.kind == "huggingface":
        raise DataError('tokenizer kind "huggingface": needs a tokenizer.json. Set its path or hf_assets_path')
    else:
        return None
    if tokenizer.vocab_size > spec.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name}: it has {tokenizer.vocab_size:,} tokens, more than the model's vocabulary of "
            f"{spec.vocab_size:,}. Raise the model's vocab_size or use a smaller tokenizer"
        )
    return tokenizer


def require_ends(tokenizer: Tokenizer, *, bos: bool, eos: bool) -> None:
    """Raises DataError if a token that is to begin or end documents is none of the tokenizer's."""
    for is_wanted, token, what in ((bos, tokenizer.bos_id, "BOS"), (eos, tokenizer.eos_id, "EOS")):
        if is_wanted and token is None:
            raise DataError(f"tokenizer {tokenizer.name}: it has no {what} token. Set data.{what.lower()} = false")


def _load(spec: TokenizerSpec, source: str, cache_dir: Path | None) -> Tokenizer:
    """From a path, or from the cached copy of a URL."""
    place = place_of("data.tokenizer_path" if spec.path else "model.hf_assets_path", source)
    allow = spec.allow_special_tokens
    if not isinstance(place, Remote):
        return load_tokenizer(place, spec.kind, allow_special_tokens=allow)
    with reading(place):
        copy = fetch(place, _NAMES_IN_FOLDER[spec.kind], COMPANIONS, cache_root(cache_dir) / "tokenizers")
    try:
        tokenizer = load_tokenizer(copy, spec.kind, allow_special_tokens=allow)
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
