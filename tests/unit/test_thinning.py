"""Large slow tables keep a choice that has what can be had."""

from __future__ import annotations

import itertools

import pytest

from tests.thinning import LARGEST, chosen


def table(*sizes: int) -> list[dict[str, str]]:
    """All combinations of parameters with so many values each."""
    names = "abcdef"[: len(sizes)]
    return [dict(zip(names, map(str, row), strict=True)) for row in itertools.product(*map(range, sizes))]


def pairs(rows: list[dict[str, str]]) -> set[tuple[tuple[str, str], ...]]:
    return {pair for row in rows for pair in itertools.combinations(sorted(row.items()), 2)}


def test_a_small_table_stays_whole() -> None:
    assert chosen(table(LARGEST)) == list(range(LARGEST))


def test_every_pair_of_values_that_fits_is_there() -> None:
    rows = table(4, 4, 3)
    assert pairs([rows[place] for place in chosen(rows)]) == pairs(rows)


def test_a_larger_table_has_every_value() -> None:
    """63 pairs of two parameters do not fit into 24 rows; all nine and seven values do."""
    rows = table(9, 9, 7)
    kept = [rows[place] for place in chosen(rows)]
    assert len(kept) == LARGEST
    assert {value for row in kept for value in row.items()} == {value for row in rows for value in row.items()}


def test_what_runs_anyway_is_not_chosen_again() -> None:
    rows, anyway = table(5, 6), [row for row in table(5, 6) if row["a"] == "0"]
    kept = [rows[place] for place in chosen(rows, anyway)]
    assert not [row for row in kept if row["a"] == "0"]


@pytest.mark.parametrize("offset", [0, 17, 63, 2**31])
def test_a_list_is_thinned_evenly(offset: int) -> None:
    kept = chosen(table(100), offset=offset)
    assert len(kept) == LARGEST
    assert max(later - earlier for earlier, later in itertools.pairwise(kept)) <= 5
    assert 0 <= kept[0] < 5
    assert 94 < kept[-1] < 100


def test_lists_begin_at_different_places() -> None:
    assert set(chosen(table(100), offset=0)) != set(chosen(table(100), offset=32))


def test_a_table_is_marked(pytester: pytest.Pytester) -> None:
    """Cases are told apart by marks alone, so every expression of `-m` works."""
    pytester.makeconftest(
        "import pytest\nfrom tests.thinning import thin\n"
        "@pytest.hookimpl(tryfirst=True)\ndef pytest_collection_modifyitems(items):\n    thin(items)\n"
    )
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    exhaustive\n")
    pytester.makepyfile(
        "import pytest\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('number', range(100))\ndef test_table(number): pass\n"
        "@pytest.mark.slow(thin=False)\n@pytest.mark.parametrize('number', range(30))\ndef test_kept(number): pass\n"
        "@pytest.mark.parametrize('number', range(100))\ndef test_quick(number): pass\n"
    )
    counts = {"slow": LARGEST + 30, "exhaustive": 100 - LARGEST, "slow or exhaustive": 130}
    for expression, count in {**counts, "not slow and not exhaustive": 100}.items():
        pytester.inline_run("-m", expression, "-p", "no:cacheprovider").assertoutcome(passed=count)
