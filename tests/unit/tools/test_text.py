"""How messages show lists of layers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from titan_growth.tools.text import sources


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((0, 1, 1, 2), "0 1 1 2"),
        ((0, None, 1, None), "0 new 1 new"),
        ((0, 1, 2, 3, 4, 0, 1, 2, 3, 4), "0 1 2 3 4 0 1 2 3 4"),
        ([layer % 32 for layer in range(96)], "0-31 0-31 0-31"),
        ([*range(20), *range(10, 32)], "0-19 10-31"),
        ([layer // 4 for layer in range(48)], " ".join(["0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3 4 4 4 4 5 5 5 5",
                                                        "6 6 6 6 7 7 7 7 8 8 8 8 ... 11 11 11 11"])),
        ((), ""),
    ],
)  # fmt: skip
def test_sources_of_layers(layers: Sequence[int | None], text: str) -> None:
    assert sources(layers) == text
