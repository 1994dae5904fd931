"""What a corpus is made of, and what was left out of it: the table that ends a preparation."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from titan_growth.tools.logs import logger
from titan_growth.tools.text import many, one_line

BAD_ROWS = "rows without text"
OTHER_MEMBERS = "members of archives that hold no text"
SECOND_TEXTS = "JSON beside a text of the same sample"
UNREADABLE = "unreadable or not UTF-8"
NEAR_DUPLICATES = "near-duplicates of files before them"
_INSIDE_OF_FILES = (BAD_ROWS, OTHER_MEMBERS, SECOND_TEXTS, UNREADABLE, NEAR_DUPLICATES)
"""Why something is left out that only reading shows. All other reasons are seen in a listing."""
_NUM_NAMES = 5


@dataclass
class Amounts:
    """Of one kind of files. Tokens include BOS and EOS."""

    files: int = 0
    bytes: int = 0
    documents: int = 0
    tokens: int = 0


@dataclass
class Named:
    """Things of one sort: how many, and the names of the first."""

    count: int = 0
    names: list[str] = field(default_factory=list)


class Account:
    """Counts what is read, by kind, and names what is not.

    Files, and what is left out, are those of one pass over the corpus from its beginning. A preparation that is
    continued takes over the documents and tokens that it has already written (`restore`).
    """

    def __init__(self) -> None:
        self.amounts: dict[str, Amounts] = {}
        self.left_out: dict[str, Named] = {}
        """By reason."""
        self.followed = Named()
        """Links that lead out of the corpus."""
        self._first_documents: list[int] = []
        self._kinds: list[str] = []

    def add_files(self, kind: str, sizes_bytes: Iterable[int]) -> None:
        """Files that are read, of one kind."""
        amounts = self.amounts.setdefault(kind, Amounts())
        for size in sizes_bytes:
            amounts.files += 1
            amounts.bytes += size

    def leave_out(self, reason: str, name: str) -> None:
        """Something that gives no document."""
        _add(self.left_out.setdefault(reason, Named()), name)

    def follow(self, link: str) -> None:
        """A link that leads out of the corpus, and is read."""
        _add(self.followed, link)

    def begin(self, kind: str, first_document: int) -> None:
        """Documents from this number on are of this kind."""
        if not self._kinds or self._kinds[-1] != kind:
            self._first_documents.append(first_document)
            self._kinds.append(kind)

    def count(self, document: int, num_tokens: int, *, is_whole: bool) -> None:
        """Tokens of the document of this number, which they may complete."""
        amounts = self.amounts[self._kinds[bisect.bisect_right(self._first_documents, document) - 1]]
        amounts.tokens += num_tokens
        amounts.documents += is_whole

    def why_nothing(self) -> str:
        """What was left out of a corpus without text, for the end of a message; empty if nothing was."""
        return f" ({'; '.join(_notes(self.to_json()))})" if self.left_out else ""

    def state(self) -> dict[str, list[int]]:
        """Documents and tokens by kind, for a journal."""
        return {kind: [amounts.documents, amounts.tokens] for kind, amounts in self.amounts.items()}

    def restore(self, state: Mapping[str, list[int]]) -> None:
        """Takes over what `state` gave. Raises ValueError, and takes over nothing, if it is of other kinds of files."""
        if state.keys() != self.amounts.keys():
            raise ValueError("other kinds of files")
        for kind, (documents, tokens) in state.items():
            self.amounts[kind].documents, self.amounts[kind].tokens = documents, tokens

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values in a fixed order."""
        kinds = [{"kind": kind, **vars(self.amounts[kind])} for kind in sorted(self.amounts)]
        left_out = [{"reason": reason, **vars(self.left_out[reason])} for reason in sorted(self.left_out)]
        return {"kinds": kinds, "left_out": left_out, "followed_links": vars(self.followed)}


def with_listing(account: Mapping[str, Any], now: Account) -> dict[str, Any]:
    """The account of an earlier preparation, but with what by now lies beside the files that it read.

    Args:
        now: of the corpus, unread.
    """
    listing = now.to_json()
    read = [entry for entry in account["left_out"] if entry["reason"] in _INSIDE_OF_FILES]
    left_out = sorted([*read, *listing["left_out"]], key=lambda entry: str(entry["reason"]))
    return {**account, "left_out": left_out, "followed_links": listing["followed_links"]}


def _add(named: Named, name: str) -> None:
    named.count += 1
    if len(named.names) < _NUM_NAMES:
        named.names.append(one_line(name, 200))


def table(account: Mapping[str, Any]) -> list[str]:
    """An account (`Account.to_json`) as lines: a row a kind, then what was left out and why."""
    columns = [entry.name for entry in fields(Amounts)]
    total = {"kind": "all", **{name: sum(row[name] for row in account["kinds"]) for name in columns}}
    rows = [*account["kinds"], *([total] if len(account["kinds"]) > 1 else [])]
    cells = [["kind", *columns], *([row["kind"], *(f"{row[name]:,}" for name in columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in cells
    ]
    return lines + _notes(account)


def _notes(account: Mapping[str, Any]) -> list[str]:
    """What was left out, and which links were followed, a line each."""
    notes = [f"left out, {entry['reason']}: {_listed(entry)}" for entry in account["left_out"]]
    if account["followed_links"]["count"]:
        notes.append(f"links that lead out of the corpus, followed: {_listed(account['followed_links'])}")
    return notes


def log_table(account: Mapping[str, Any], what: str = "data") -> None:
    """Logs an account as a table."""
    for line in table(account):
        logger.info("%s: %s", what, line)


def _listed(named: Mapping[str, Any]) -> str:
    more = named["count"] - len(named["names"])
    return ", ".join(named["names"]) + (f" and {many(more, 'other')}" if more else "")
