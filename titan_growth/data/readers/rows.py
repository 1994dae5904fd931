"""From rows to texts: which rows are skipped, which are bad, and what happens to those.

A reader of records yields each row as a function that gives its record, so that a row which is skipped costs nothing.
The function raises BadRowError for a row that holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from titan_growth.data.account import BAD_ROWS, Account
from titan_growth.data.readers.place import BadRowError, Place, UnusableError
from titan_growth.data.readers.text_rule import TextRule


class Row(NamedTuple):
    """A row that has not been looked at yet."""

    record: Callable[[], Any]
    """Raises BadRowError."""
    may_have_surrogates: bool = False
    """Whether its strings may hold what UTF-8 cannot."""


@dataclass(frozen=True)
class ReadRules:
    """What a recipe says about reading.

    text: which text of a record is the document.
    max_bad_rows: how many rows may hold no text and be left out; None: the first one stops the preparation.
    refuse_markup: a text file of HTML or XML is an error.
    """

    text: TextRule
    max_bad_rows: int | None = None
    refuse_markup: bool = True


class Skip:
    """The number of documents still to skip before reading starts."""

    def __init__(self, num_documents: int) -> None:
        self.remaining = num_documents

    def take(self, available: int) -> int:
        """How many of `available` documents to skip."""
        taken = min(self.remaining, available)
        self.remaining -= taken
        return taken


@dataclass
class Pass:
    """One pass over a corpus, from its beginning on."""

    rules: ReadRules
    skip: Skip
    account: Account = field(default_factory=Account)
    num_bad_rows: int = 0

    @property
    def skips_unread(self) -> bool:
        """Whether each row is a document, so that rows can be skipped without being looked at."""
        return self.rules.max_bad_rows is None

    def texts(self, rows: Iterable[Row], place: Place) -> Iterator[str]:
        """The texts of rows, from the first that is not skipped. Raises BadRowError, or UnusableError beyond the limit.

        A bad row is no document, so on a later pass it is left out again and moves no other document's number.
        """
        rule = self.rules.text
        for row in rows:
            if self.skips_unread and self.skip.take(1):
                continue
            try:
                text = rule.text_of(row.record(), may_have_surrogates=row.may_have_surrogates)
            except BadRowError as error:
                self._leave_out(error, place)
                continue
            if self.skips_unread or not self.skip.take(1):
                yield text

    def _leave_out(self, error: BadRowError, place: Place) -> None:
        """Counts a bad row. Raises its error if none is allowed, and UnusableError beyond the limit."""
        limit = self.rules.max_bad_rows
        if limit is None:
            raise error
        self.num_bad_rows += 1
        if self.num_bad_rows > limit:
            reason = f"{error.reason}; this is bad row {self.num_bad_rows:,}, and data.max_bad_rows is {limit:,}"
            raise UnusableError(reason, f"{error.fix}, or raise data.max_bad_rows") from error
        self.account.leave_out(BAD_ROWS, f"{place.short} ({error.reason})")
