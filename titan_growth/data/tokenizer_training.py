"""Training a SentencePiece tokenizer on a corpus: deterministic, lossless, done in seconds.

The model is a BPE with byte fallback, so it encodes any text. Nothing is normalized, trimmed or prefixed; line breaks
and tabs are tokens. (One loss lies in the format: it writes a space as U+2581, which therefore decodes to a space.)
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator

from titan_growth.data.corpus import Corpus
from titan_growth.tools.errors import DataError
from titan_growth.tools.logs import logger

TRAINER_VERSION = "bpe-1"
"""Part of the cache key; change it with anything below that changes the trained model."""

_SAMPLE_CHARS = 4_000_000
_LONGEST_PASSAGE_BYTES = 256_000_000
_MAX_LINE_CHARS = 1000  # at most 4000 bytes, below the 4192 bytes beyond which the trainer drops a line
_SPREAD = 2654435761  # odd, near 2**32 / golden ratio: multiples spread evenly over 2**32
_SMALLEST_VOCAB_SIZE = 3 + 256 + 2 + 1  # unk, bos, eos; bytes; line break and tab; one piece


def train_sentencepiece(corpus: Corpus, vocab_size: int) -> bytes:
    """The model, trained on a deterministic sample of the corpus; unk 0, bos 1, eos 2, no padding token.

    Raises DataError if the corpus is too small for the vocabulary (naming the largest possible), or has more characters
    than the vocabulary has room for.
    """
    import sentencepiece

    require_vocab_size(vocab_size)
    started = time.monotonic()
    lines = iter(sample_lines(corpus))
    first = next(lines, None)
    if first is None:
        raise DataError(f"tokenizer training: {corpus.describe()} holds no text. Use a corpus with text")
    model = io.BytesIO()
    # The trainer's C++ code would lose an exception of the iterator, so it is kept and raised here.
    errors: list[DataError] = []

    def feed() -> Iterator[str]:
        yield first
        try:
            yield from lines
        except DataError as error:
            errors.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=feed(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            num_threads=1,  # the result must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise errors[0] if errors else _explain(str(error), corpus, vocab_size) from error
    if errors:
        raise errors[0]
    logger.info("trained a tokenizer of %d tokens in %.1f s", vocab_size, time.monotonic() - started)
    return model.getvalue()


def require_vocab_size(vocab_size: int) -> None:
    """Raises DataError for a vocabulary that no corpus could be encoded with."""
    if vocab_size < _SMALLEST_VOCAB_SIZE:
        raise DataError(
            f"tokenizer training: vocab_size {vocab_size} is too small. Use at least {_SMALLEST_VOCAB_SIZE}, "
            "or the bytes tokenizer"
        )


def sample_lines(corpus: Corpus) -> Iterator[str]:
    """Lines of at most 1000 characters, about 4 million in all, spread over the first 256 MB of the corpus.

    Which are taken depends on the corpus alone; longer lines are cut.
    """
    passage_bytes = min(corpus.num_bytes or _LONGEST_PASSAGE_BYTES, _LONGEST_PASSAGE_BYTES)
    share = min(1.0, _SAMPLE_CHARS / max(passage_bytes, 1))
    threshold = int(share * 2**32)
    number = num_chars = num_chars_seen = 0
    for parts in corpus.document_parts():
        for part in parts:
            for line in part.split("\n"):
                for start in range(0, len(line), _MAX_LINE_CHARS):
                    piece = line[start : start + _MAX_LINE_CHARS]
                    number += 1
                    num_chars_seen += len(piece)
                    if number * _SPREAD % 2**32 >= threshold or not piece.strip() or "\0" in piece:
                        continue
                    yield piece
                    num_chars += len(piece)
                    if num_chars >= _SAMPLE_CHARS:
                        return
            if num_chars_seen > _LONGEST_PASSAGE_BYTES:
                return


def _explain(message: str, corpus: Corpus, vocab_size: int) -> DataError:
    where = f"tokenizer training on {corpus.describe()}"
    if too_large := re.search(r"too high.*<= (\d+)", message):
        return DataError(
            f"{where}: the corpus is too small for a vocab_size of {vocab_size:,}. "
            f"The largest possible is {int(too_large[1]):,}; set vocab_size to that or less, or use a larger corpus"
        )
    if too_small := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return DataError(
            f"{where}: a vocab_size of {vocab_size:,} is smaller than the characters that the corpus needs. "
            f"Set it to more than {int(too_small[1]):,}"
        )
    return DataError(f"{where}: sentencepiece failed ({' '.join(message.split())[:200]}). Use another vocab_size")
