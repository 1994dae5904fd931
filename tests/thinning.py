"""Which cases of a large slow table run with `-m slow`, and which only with `-m "slow or exhaustive"`.

Two thousand slow cases take more hours than anybody waits. A table with more than `LARGEST` of them keeps that many,
chosen so that together they have as many different pairs of values of two parameters as can be had (a table of one
parameter: cases evenly spread, from a place that follows from the test's name, so that tables over the same meshes keep
different ones). The choice depends on nothing but the table. `@pytest.mark.slow(thin=False)` keeps a table as it is.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pytest

LARGEST = 24

Row = Mapping[str, str]
"""Parameter -> its value, as text."""
Facts = frozenset[tuple[tuple[str, str], ...]]
"""Pairs of parameters with their values."""


def thin(items: Sequence[pytest.Item]) -> None:
    """Marks the slow cases that are left out as exhaustive, instead of slow."""
    tables: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tables.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, cases in tables.items():
        slow = [case for case in cases if (mark := case.get_closest_marker("slow")) and mark.kwargs.get("thin", True)]
        quick = [case for case in cases if not case.get_closest_marker("slow")]
        kept = set(chosen([_row(case) for case in slow], [_row(case) for case in quick], zlib.crc32(name.encode())))
        for place, case in enumerate(slow):
            if place not in kept:
                case.own_markers[:] = [mark for mark in case.own_markers if mark.name != "slow"]
                case.add_marker("exhaustive")


def chosen(rows: Sequence[Row], others: Iterable[Row] = (), offset: int = 0, largest: int = LARGEST) -> list[int]:
    """The places of the rows that are kept, in rising order.

    Args:
        others: rows that run anyway; their pairs need no other row.
        offset: where an even choice begins, in a table of one parameter.
    """
    if len(rows) <= largest:
        return list(range(len(rows)))
    if len({value for row in rows for value in row.items()}) == len(rows) * len(rows[0]):  # one axis, by any name
        step = len(rows) / largest
        return sorted({int((place + offset % 64 / 64) * step) for place in range(largest)})
    facts = [_pairs(row) for row in rows]
    covered = set(itertools.chain.from_iterable(map(_pairs, others)))
    left, kept, used = list(range(len(rows))), list[int](), Counter[tuple[str, str]]()

    def rank(place: int) -> tuple[int, int]:
        """New pairs first; among as many, values that were chosen least often, so that none is left out."""
        return len(facts[place] - covered), -sum(used[value] for value in rows[place].items())

    while len(kept) < largest:
        best = max(left, key=rank)
        left.remove(best)
        kept.append(best)
        covered |= facts[best]
        used.update(rows[best].items())
    return sorted(kept)


def _pairs(row: Row) -> Facts:
    return frozenset(itertools.combinations(sorted(row.items()), 2))


def _row(case: pytest.Function) -> Row:
    return {name: repr(value) for name, value in case.callspec.params.items()}
