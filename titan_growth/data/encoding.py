"""Encoding documents: every document gets the tokens that it has as a whole, and they are dealt to its pieces.

Cutting a text and encoding the parts gives other tokens: a false space at each cut, a word in two. So a short document
is encoded in one call, and where the split cuts its text, its tokens are cut: a token belongs where it starts. A long
document is encoded in windows that overlap by twice `CONTEXT_CHARS`. Where two meet, the overlap is encoded by itself
as well, which has the left window's end and the right window's beginning. Only if it has the tokens of both, except
near its own ends, does it make no difference what stands further to the left or right. Then the windows' tokens are put
together there; else the windows are joined and encoded as one, the whole document if need be.

One library cannot be repeated window by window: a sentencepiece Unigram model sums up scores over the whole text in 32
bits, so in a long text rounding decides between encodings that are equally good. There, the windows' are taken.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from titan_growth.data.tokenizer import Encoded, Tokenizer
from titan_growth.data.windows import CONTEXT_CHARS, Segment, Window
from titan_growth.tools.errors import DataError


@dataclass(frozen=True)
class Part:
    """Tokens of contiguous segments of a document that go to one split."""

    segments: tuple[Segment, ...]
    tokens: np.ndarray


class Joint:
    """The overlap of two windows, encoded by itself."""

    def __init__(self, encoded: Encoded, cut: int) -> None:
        """cut: the character at which one window's own text ends and the other's begins."""
        starts = _places(encoded, [cut - CONTEXT_CHARS // 2, cut, cut + CONTEXT_CHARS // 2])
        self._tokens = _array(encoded.ids)
        self._settled, self.num_left, self._unsettled = starts
        self.num_right = len(encoded.ids) - self.num_left
        self.right_start = encoded.starts[self.num_left] if self.num_right else None
        """Where the first token on the right starts, in the text of the joint and of the window on the right."""
        self._can_tell = self._settled < self.num_left < self._unsettled
        if encoded.words is not None:
            # Equally good encodings of one word may be told apart by what is not in sight: there must be whole words.
            new = [
                number for number in range(1, len(encoded.words)) if encoded.words[number] != encoded.words[number - 1]
            ]
            self._can_tell &= any(self._settled < number <= self.num_left for number in new)
            self._can_tell &= any(self.num_left <= number < self._unsettled for number in new)

    def fits(self, left: EncodedWindow, right: EncodedWindow) -> bool:
        """Whether the window on the left ends, and the one on the right begins, with its tokens."""
        tail = self._tokens[self._settled :]
        ends = np.array_equal(left.tokens[max(0, len(left.tokens) - len(tail)) :], tail)
        # A window without other tokens has nothing but blanks besides, and may itself end where they begin to matter.
        has_more = (not left.window.before or len(left.tokens) > len(self._tokens)) and (
            not right.window.after or len(right.tokens) > len(self._tokens)
        )
        return self._can_tell and has_more and ends and self.begins(right.tokens)

    def begins(self, right: np.ndarray) -> bool:
        """Whether a window's tokens on the right begin with its tokens."""
        return np.array_equal(right[: self._unsettled], self._tokens[: self._unsettled])


@dataclass(frozen=True)
class EncodedWindow:
    """A window with its tokens, their places where it has several splits, and the joint with the window before."""

    window: Window
    tokens: np.ndarray
    places: Encoded | None
    joint: Joint | None
    head: int = 0
    """How many tokens at its beginning are those of the window before."""


class DocumentEncoder:
    """Encodes windows in batches, ahead of whoever uses them, and puts their tokens together."""

    def __init__(self, tokenizer: Tokenizer, num_threads: int) -> None:
        """num_threads: each gives a batch to the library, which encodes outside of Python's lock on its own threads.

        They should be more than the cores, and the batches small: then no core waits for a batch's last window, nor
        for Python to take over its tokens.
        """
        self._tokenizer = tokenizer
        self._num_threads = num_threads
        self._left: EncodedWindow | None = None
        self._wanted_chars = 0

    def encode(self, batches: Iterable[list[Window]]) -> Iterator[list[Part]]:
        """The parts of each batch of windows that are known once it is encoded. Raises DataError."""
        with ThreadPoolExecutor(self._num_threads) as threads:
            waiting: list[Future[list[EncodedWindow]]] = []
            try:
                for batch in batches:
                    waiting.append(threads.submit(self._encoded, batch))
                    if len(waiting) > 2 * self._num_threads:
                        yield self._parts(waiting.pop(0).result())
                while waiting:
                    yield self._parts(waiting.pop(0).result())
            finally:
                for future in waiting:
                    future.cancel()

    def _encoded(self, windows: list[Window]) -> list[EncodedWindow]:
        with_places = [window for window in windows if _has_splits(window)]
        joints = [window for window in windows if window.before]
        overlaps = [window.text[: len(window.before) + CONTEXT_CHARS] for window in joints]
        placed = self._tokenizer.encode_with_starts([*(window.text for window in with_places), *overlaps])
        plain = iter(self._tokenizer.encode_batch([one.text for one in windows if not _has_splits(one)]))
        places, overlap = iter(placed[: len(with_places)]), iter(placed[len(with_places) :])
        found = []
        for window in windows:
            its_places = next(places) if _has_splits(window) else None
            tokens = _array(its_places.ids if its_places is not None else next(plain))
            joint = Joint(next(overlap), len(window.before)) if window.before else None
            found.append(EncodedWindow(window, tokens, its_places, joint, joint.num_left if joint is not None else 0))
        return found

    def _parts(self, encoded: list[EncodedWindow]) -> list[Part]:
        return [part for one in encoded for part in self._add(one)]

    def _add(self, right: EncodedWindow) -> Iterator[Part]:
        """The parts that are known with one more window."""
        left, joint = self._left, right.joint
        if left is None:
            self._left = right
        else:
            assert joint is not None
            is_waited_for = left.window.num_chars < self._wanted_chars
            if not is_waited_for and joint.fits(left, right):
                yield from self._dealt(left, len(left.tokens) - joint.num_right)
                self._left, self._wanted_chars = right, 0
            else:
                self._left = self._joined(left, right, is_waited_for)
        if right.window.segments[-1].ends_document:
            assert self._left is not None
            yield from self._dealt(self._left, len(self._left.tokens))
            self._left, self._wanted_chars = None, 0

    def _joined(self, left: EncodedWindow, right: EncodedWindow, is_waited_for: bool) -> EncodedWindow:
        """One window of two that cannot be told apart; it doubles before it is tried again."""
        window = left.window.joined(right.window)
        if not is_waited_for:
            self._wanted_chars = 2 * left.window.num_chars
        if window.num_chars < self._wanted_chars and not window.segments[-1].ends_document:
            return replace(left, window=window, places=None)  # not encoded yet
        (encoded,) = self._encoded([window])
        if encoded.joint is None or encoded.joint.begins(encoded.tokens):
            return encoded
        if self._tokenizer.rounds_long_texts:
            (placed,) = self._tokenizer.encode_with_starts([window.text])
            if encoded.joint.right_start in placed.starts:
                return replace(encoded, head=placed.starts.index(encoded.joint.right_start))
        raise DataError(
            f"tokenizer {self._tokenizer.name}: how it encodes a text depends on what follows much later, in document "
            f"{window.segments[0].document}. Use another tokenizer, or shorter documents"
        )

    def _dealt(self, one: EncodedWindow, stop: int) -> Iterator[Part]:
        """The tokens of a window up to one of them, as parts of one split each."""
        if one.places is None:
            yield Part(one.window.segments, one.tokens[one.head : stop])
            return
        runs = [tuple(run) for _, run in groupby(one.window.segments, key=lambda segment: segment.split)]
        lengths = [sum(len(segment.text) for segment in run) for run in runs[:-1]]
        cuts = _places(one.places, [len(one.window.before) + length for length in np.cumsum(lengths)])
        for run, first, last in zip(runs, [one.head, *cuts], [*cuts, stop], strict=True):
            yield Part(run, one.tokens[first:last])


def _has_splits(window: Window) -> bool:
    return len({segment.split for segment in window.segments}) > 1


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(array("I", ids))  # three times as fast as an array of a list


def _places(encoded: Encoded, chars: list[int]) -> list[int]:
    """For each character, how many tokens start before it."""
    starts = np.maximum.accumulate(np.array(encoded.starts, dtype=np.int64))
    return [int(place) for place in np.searchsorted(starts, chars)]
