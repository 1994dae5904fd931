"""Documents as windows: the stretches of text that are given to a tokenizer, one call for many.

A document of up to `WHOLE_CHARS` characters is one window. A longer one is cut into segments, and the window of each
has some of the text on both sides as context (`encoding` says what for). How a document came in changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from titan_growth.data.readers.documents import Document
from titan_growth.data.special_tokens import SpellingCounter
from titan_growth.data.splitting import SplitRule, cut

WHOLE_CHARS = 1 << 16
"""Up to this length a document is encoded in one call."""
SEGMENT_CHARS = 1 << 15
"""Of a longer one, about this much, if it all goes to one split. The tokenizers library takes more seconds for each
character of longer texts."""
ROUNDING_SCALE = 4
"""How much longer both are for a tokenizer that rounds in long texts. There, where a text is cut decides between
equally good encodings, so these lengths stay what they were when the first such corpus was prepared."""
CONTEXT_CHARS = 512
"""Context on each side; at most half of the shortest piece that `cut` makes."""


@dataclass(frozen=True)
class Segment:
    """A contiguous part of a document, whole or part of a piece that goes to one split."""

    document: int
    """Number of the document in the corpus."""
    text: str
    begins_document: bool
    ends_document: bool
    ends_piece: bool
    split: str
    num_spellings: int = 0
    """How often a special token's text begins in it."""


@dataclass(frozen=True)
class Window:
    """Segments that are encoded together, between texts of the same document that are not theirs."""

    segments: tuple[Segment, ...]
    before: str = ""
    after: str = ""

    @property
    def text(self) -> str:
        """What the tokenizer gets."""
        return "".join([self.before, *(segment.text for segment in self.segments), self.after])

    @property
    def num_chars(self) -> int:
        """Length without the context."""
        return sum(len(segment.text) for segment in self.segments)

    def joined(self, following: Window) -> Window:
        """One window for this and the next one of the document."""
        return Window((*self.segments, *following.segments), self.before, following.after)


@dataclass(frozen=True)
class Beginning:
    """Where a preparation begins to read: a document of the corpus, and the number of its first piece.

    segments: how many segments of the document are done.
    """

    document: int = 0
    piece: int = 0
    segments: int = 0


def windows_of(
    documents: Iterable[Document], at: Beginning, rule: SplitRule, special: Iterable[str], scale: int = 1
) -> Iterator[Window]:
    """The windows of documents, the first of which is the one of the beginning, without what is done of it.

    Args:
        special: the texts whose occurrences are counted.
        scale: what the lengths of windows and segments are multiplied by.
    """
    counter = SpellingCounter(special)
    num_pieces, num_done = at.piece, at.segments
    for number, parts in enumerate(documents, start=at.document):
        counter.begin()
        segments = _segments(number, parts, rule, num_pieces, SEGMENT_CHARS * scale)
        for window in _windows(_counted(segments, counter), scale):
            if num_done <= 0:
                yield window
            num_done -= len(window.segments)
            num_pieces += sum(segment.ends_piece for segment in window.segments)
        num_done = 0


def batched(windows: Iterable[Window], num_chars: int, num_windows: int) -> Iterator[list[Window]]:
    """Windows in batches of that many characters or more, but of no more than that many windows."""
    batch: list[Window] = []
    missing = num_chars
    for window in windows:
        batch.append(window)
        missing -= window.num_chars
        if missing <= 0 or len(batch) >= num_windows:
            yield batch
            batch, missing = [], num_chars
    if batch:
        yield batch


def _segments(
    document: int, parts: Document, rule: SplitRule, num_pieces: int, segment_chars: int
) -> Iterator[Segment]:
    for number, piece in enumerate(cut(parts, rule.piece_chars), start=num_pieces):
        split = rule.split_of(number)
        for part in cut([piece.text], segment_chars):
            begins, ends = piece.begins_document and part.begins_document, piece.ends_document and part.ends_document
            yield Segment(document, part.text, begins, ends, part.ends_document, split)


def _counted(segments: Iterator[Segment], counter: SpellingCounter) -> Iterator[Segment]:
    def counted(segment: Segment, following: str) -> Segment:
        found = counter.count(segment.text, following)
        return replace(segment, num_spellings=found) if found else segment

    held = next(segments, None)
    for segment in segments:
        assert held is not None
        yield counted(held, segment.text)
        held = segment
    if held is not None:
        yield counted(held, "")


def _windows(segments: Iterator[Segment], scale: int) -> Iterator[Window]:
    """The windows of one document."""
    held: list[Segment] = []
    num_chars = 0
    for segment in segments:
        held.append(segment)
        num_chars += len(segment.text)
        if num_chars > WHOLE_CHARS * scale:
            yield from _with_context(held, segments, SEGMENT_CHARS * scale)
            return
    if held:
        yield Window(tuple(held))


def _with_context(held: list[Segment], segments: Iterator[Segment], segment_chars: int) -> Iterator[Window]:
    """Windows of about so many characters of one split each."""
    before = ""
    group, num_chars = held[:1], len(held[0].text)
    for segment in chain(held[1:], segments):
        num_chars += len(segment.text)
        if segment.split != group[-1].split or num_chars > segment_chars * 5 // 4:
            yield Window(tuple(group), before, segment.text[:CONTEXT_CHARS])
            before, group, num_chars = group[-1].text[-CONTEXT_CHARS:], [], len(segment.text)
        group.append(segment)
    yield Window(tuple(group), before)
