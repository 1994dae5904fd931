"""Dealing the tokens of documents to the splits, with BOS and EOS at the documents' real ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from titan_growth.data.account import Account
from titan_growth.data.encoding import Part
from titan_growth.data.shard_writer import SplitWriter
from titan_growth.tools.logs import logger


@dataclass
class Position:
    """How far a preparation has come; the journal keeps it."""

    document: int = 0
    segments_of_document: int = 0
    pieces: int = 0
    pieces_before_document: int = 0
    run: str | None = None
    """The split that takes this document's current run of pieces."""
    chars: int = 0
    spellings: int = 0
    """How often special tokens have been spelled."""
    spelling_documents: int = 0
    """In how many documents."""
    spells: bool = False
    """Whether this document is among them."""

    def log_spellings(self, *, as_tokens: bool) -> None:
        """Logs how often texts spell special tokens, if they do, and whether those have become such tokens."""
        if self.spellings:
            logger.info(
                "the text of %s documents spells special tokens, %s times in all; it is encoded as %s "
                "(data.allow_special_tokens)",
                f"{self.spelling_documents:,}",
                f"{self.spellings:,}",
                "those tokens" if as_tokens else "any other text",
            )


class PartWriter:
    """Writes parts in their order, from a position on, which it moves."""

    def __init__(
        self, writers: Mapping[str, SplitWriter], bos: list[int], eos: list[int], at: Position, account: Account
    ) -> None:
        """bos, eos: what to put before and after each document. account: counts what is written."""
        self._writers, self._bos, self._eos, self._at, self._account = writers, bos, eos, at, account

    def write(self, part: Part) -> None:
        """Write one part. Raises OSError of the disk."""
        at, first, last = self._at, part.segments[0], part.segments[-1]
        if first.begins_document:
            at.document, at.segments_of_document, at.run, at.spells = first.document, 0, None, False
            at.pieces_before_document = at.pieces
        split = first.split
        if at.run != split:
            at.run = None
        bos, eos = self._bos if first.begins_document else [], self._eos if last.ends_document else []
        tokens = np.concatenate([np.array(bos, np.int64), part.tokens, np.array(eos, np.int64)])
        if len(tokens):
            if at.run is None:
                self._writers[split].begin_document()
                at.run = split
            self._writers[split].append(tokens)
        at.pieces += sum(segment.ends_piece for segment in part.segments)
        at.segments_of_document += len(part.segments)
        self._account.count(first.document, len(tokens), is_whole=last.ends_document)
        self._count(part)

    def _count(self, part: Part) -> None:
        at = self._at
        spellings = sum(segment.num_spellings for segment in part.segments)
        at.spelling_documents += bool(spellings and not at.spells)
        at.spells = at.spells or spellings > 0
        at.spellings += spellings
        at.chars += sum(len(segment.text) for segment in part.segments)
