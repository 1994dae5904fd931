"""Tokenizers of the `sentencepiece` library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from titan_growth.data.readers import reading
from titan_growth.data.tokenizer import Encoded, Tokenizer, library_errors, starts_of_bytes

MODEL_NAME = "tokenizer.model"
_UNIGRAM = 1


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. Raises DataError if it is missing or not one.

    Its special tokens are the control symbols, BOS and EOS among them, which no text becomes. User-defined symbols are
    pieces of text like any other.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        with reading(self._path):
            self._model = self._path.read_bytes()
        with library_errors(
            self._path, "not a SentencePiece model", "Name a .model file that was written by sentencepiece"
        ):
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self.name = f"sentencepiece {self._path.name}"
        self.vocab_size = self._processor.piece_size()
        special = (self._processor.bos_id(), self._processor.eos_id())
        self.bos_id, self.eos_id = (token if token >= 0 else None for token in special)
        control = [token for token in range(self.vocab_size) if self._processor.is_control(token)]
        self.rounds_long_texts = _is_unigram(self._model)
        self.special_texts = tuple(sorted(self._processor.id_to_piece(token) for token in control))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with self._encoding():
            return list(self._processor.encode(texts)) if texts else []

    def encode_with_starts(self, texts: list[str]) -> list[Encoded]:
        messages = _messages().texts
        found = []
        with self._encoding():
            for text, data in zip(texts, self._processor.encode(texts, out_type="serialized_proto"), strict=True):
                message = messages.SentencePieceText()
                message.ParseFromString(data)
                chars = [*starts_of_bytes(text), len(text)]
                ids = [piece.id for piece in message.pieces]
                found.append(Encoded(ids, [chars[piece.begin] for piece in message.pieces]))
        return found

    def _encoding(self) -> Any:
        return library_errors(self._path, "cannot encode the corpus", "Use another tokenizer")

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(token) for token in ids]))

    def files(self) -> dict[str, bytes]:
        return {MODEL_NAME: self._model}


@dataclass(frozen=True)
class _Messages:
    """The library's protocol buffers."""

    models: Any
    texts: Any


def _messages() -> _Messages:
    # Not at the top: they take longer to import than the library.
    from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

    return _Messages(sentencepiece_model_pb2, sentencepiece_pb2)


def _is_unigram(data: bytes) -> bool:
    model = _messages().models.ModelProto()
    model.ParseFromString(data)
    return bool(model.trainer_spec.model_type == _UNIGRAM)
