"""Cutting documents into pieces and dealing the pieces to training and validation.

Whole documents are too coarse a unit for a validation set: a corpus can be a single file. So long documents are cut,
near line breaks, into pieces of bounded length, and every n-th piece of the corpus goes to validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from titan_growth.tools.errors import DataError

TRAIN, VALIDATION = "train", "validation"

_SMALLEST_PIECE_CHARS = 4096
_LARGEST_PIECE_CHARS = 1 << 20
# The second piece is the first that goes to validation: soon enough for a corpus of two pieces.
_FIRST_VALIDATION_PIECE = 1


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one document."""

    text: str
    begins_document: bool
    ends_document: bool


@dataclass(frozen=True)
class SplitRule:
    """How long pieces are, in characters, and which of them are validation: one in `period`, none if that is 0."""

    piece_chars: int
    period: int

    def split_of(self, piece_number: int) -> str:
        """The split of the piece with this number, counted through the whole corpus."""
        return VALIDATION if self.period and piece_number % self.period == _FIRST_VALIDATION_PIECE else TRAIN


def split_rule(validation_fraction: float, num_bytes: int | None) -> SplitRule:
    """The rule for a fraction in [0, 0.5] of a corpus of about `num_bytes` bytes. Raises DataError outside that range.

    The fraction is realized as one piece in round(1 / fraction). Pieces are short enough that validation gets several.
    """
    if not 0.0 <= validation_fraction <= 0.5:
        raise DataError(f"validation_fraction {validation_fraction}: not between 0 and 0.5. Use for example 0.01")
    if validation_fraction == 0.0:
        return SplitRule(_LARGEST_PIECE_CHARS, 0)
    wanted = _LARGEST_PIECE_CHARS if num_bytes is None else int(num_bytes * validation_fraction / 4)
    return SplitRule(min(max(wanted, _SMALLEST_PIECE_CHARS), _LARGEST_PIECE_CHARS), round(1 / validation_fraction))


def cut(parts: Iterable[str], piece_chars: int) -> Iterator[Piece]:
    """Cut one document, given as text parts, into pieces; their texts joined are the document. Empty: no pieces.

    A document of up to 1.25 * piece_chars characters stays whole. A longer one is cut after the last line break, or
    before the last space, in the last quarter of each piece_chars characters, or hard if there is neither. Where it is
    cut does not depend on how the text came in parts, of which at most one piece and one part are kept in memory.
    """
    longest = piece_chars + piece_chars // 4
    text, start, begins = "", 0, True
    for part in parts:
        text, start = text[start:] + part, 0
        while len(text) - start > longest:
            end = _cut_position(text, start + piece_chars * 3 // 4, start + piece_chars)
            yield Piece(text[start:end], begins, False)
            start, begins = end, False
    if start < len(text):
        yield Piece(text[start:], begins, True)


def _cut_position(text: str, earliest: int, latest: int) -> int:
    line_break = text.rfind("\n", earliest, latest)
    if line_break >= 0:
        return line_break + 1
    space = text.rfind(" ", earliest, latest)
    return space if space >= 0 else latest
