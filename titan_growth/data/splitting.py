"""Cutting documents into pieces and dealing the pieces to training and validation.

A corpus can be a single file, so long documents are cut near line breaks, and every n-th piece goes to validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from titan_growth.tools.errors import DataError

TRAIN, VALIDATION = "train", "validation"

_SMALLEST_PIECE_CHARS = 4096
_LARGEST_PIECE_CHARS = 1 << 20
_FIRST_VALIDATION_PIECE = 1  # so that a corpus of two pieces has one


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one document."""

    text: str
    begins_document: bool
    ends_document: bool


@dataclass(frozen=True)
class SplitRule:
    """Length of pieces in characters, and which are validation: one in `period`, none if 0."""

    piece_chars: int
    period: int

    def split_of(self, piece_number: int) -> str:
        """The split of a piece, by its number in the whole corpus."""
        return VALIDATION if self.period and piece_number % self.period == _FIRST_VALIDATION_PIECE else TRAIN


def split_rule(validation_fraction: float, num_bytes: int | None) -> SplitRule:
    """One piece in round(1 / fraction), pieces being short enough that validation gets several of `num_bytes` bytes.

    Raises DataError for a fraction outside [0, 0.5].
    """
    if not 0.0 <= validation_fraction <= 0.5:
        raise DataError(f"validation_fraction {validation_fraction}: not between 0 and 0.5. Use for example 0.01")
    if validation_fraction == 0.0:
        return SplitRule(_LARGEST_PIECE_CHARS, 0)
    wanted = _LARGEST_PIECE_CHARS if num_bytes is None else int(num_bytes * validation_fraction / 4)
    return SplitRule(min(max(wanted, _SMALLEST_PIECE_CHARS), _LARGEST_PIECE_CHARS), round(1 / validation_fraction))


def cut(parts: Iterable[str], piece_chars: int) -> Iterator[Piece]:
    """Cut one document, given as text parts, into pieces; an empty one into none.

    Up to 1.25 * piece_chars characters stay whole. A longer document is cut after the last line break, or before the
    last space, in the last quarter of each piece_chars characters, or hard if there is neither. Cuts do not depend on
    the parts, of which one, and one piece, are kept in memory.
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
