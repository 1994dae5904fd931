"""Telling texts that were seen before, but for edits, from new ones: by the runs of lines that they share.

A text is a near-duplicate when more than half of its runs of five lines stood in texts before it: vendored copies,
generated variants, the next version of a file. Lines count without their indentation, and empty ones not at all. Of the
runs' hashes one in four is kept, the same ones in every text (sampling by value, Manber 1994), so that memory is about
10 bytes per line of text.
"""

from __future__ import annotations

import hashlib
import zlib

_LINES = 5
_KEPT_OF = 4
_MOST_SEEN = 0.5


class NearDuplicates:
    """Texts in an order, each told from those before it that were new."""

    def __init__(self) -> None:
        self._runs: set[int] = set()
        self._texts: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Whether the text is no near-duplicate; if so, later ones are held against it, too."""
        lines = [stripped for line in text.encode().splitlines() if (stripped := line.strip())]
        whole = hashlib.blake2b(b"\n".join(lines), digest_size=8).digest()
        if whole in self._texts:
            return False
        runs = _runs_of(lines)
        if runs and len(runs & self._runs) > _MOST_SEEN * len(runs):
            return False
        self._texts.add(whole)
        self._runs.update(runs)
        return True


def _runs_of(lines: list[bytes]) -> set[int]:
    """The kept hashes of a text's runs of lines; none of a text that is shorter than a run.

    Two runs in 4 billion that share a hash by accident are nothing against the half that decides.
    """
    hashes = (zlib.crc32(b"\n".join(lines[start : start + _LINES])) for start in range(len(lines) - _LINES + 1))
    return {run for run in hashes if run % _KEPT_OF == 0}
