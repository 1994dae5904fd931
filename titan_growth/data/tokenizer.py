"""What a tokenizer is to preparation, and the one without files: plain bytes."""

from __future__ import annotations

import abc
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titan_growth.tools.errors import DataError
from titan_growth.tools.text import one_line

BYTES_NAME = "tokenizer.bytes"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and of each the character at which it starts."""

    ids: list[int]
    starts: list[int]
    words: list[int] | None = None
    """The number of the word that each is a part of, where words are encoded by themselves and that has to be known."""


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Unless `allows_special_tokens`, no text is encoded to one of the special tokens, however it spells one.
    """

    name: str
    """For logs."""
    vocab_size: int
    """One more than the largest token id."""
    bos_id: int | None
    """Token that begins a document, if there is one."""
    eos_id: int | None
    """Token that ends a document, if there is one."""
    special_texts: tuple[str, ...] = ()
    """How a text spells special tokens: what is counted, and encoded as them where `allows_special_tokens`."""
    allows_special_tokens: bool = False
    rounds_long_texts: bool = False
    """Sums of scores over the whole text are rounded, which decides between encodings that are equally good."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on the library's threads. Raises DataError for a text that it cannot encode."""

    @abc.abstractmethod
    def encode_with_starts(self, texts: list[str]) -> list[Encoded]:
        """`encode_batch` with the place of each token. Raises DataError for a text that it cannot encode."""

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


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as tokens 0..255, BOS (256), EOS (257). Decoding drops both and replaces invalid UTF-8."""

    name = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_with_starts(self, texts: list[str]) -> list[Encoded]:
        encoded = self.encode_batch(texts)
        return [Encoded(ids, starts_of_bytes(text)) for text, ids in zip(texts, encoded, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        return {BYTES_NAME: b"one token per UTF-8 byte, bos 256, eos 257\n"}


def starts_of_bytes(text: str) -> list[int]:
    """Of each byte of a text in UTF-8, the number of the character that it belongs to."""
    if text.isascii():
        return list(range(len(text)))
    return [number for number, char in enumerate(text) for _ in char.encode("utf-8")]


@contextlib.contextmanager
def library_errors(where: object, what: str, fix: str) -> Iterator[None]:
    """Turn what the tokenizer libraries raise into a DataError "WHERE: WHAT (reason). FIX".

    They raise bare Exception, and a panic of their Rust code is not even one.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, DataError):
        raise
    except BaseException as error:
        raise DataError(f"{where}: {what} ({one_line(str(error), 200)}). {fix}") from error
