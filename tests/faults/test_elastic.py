"""The elastic matrix, but for the pairs that are tested by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.elastic import PAIRS, QUICK, TOLERANCE, Elastic
from tests.harness import WarmRanks


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    ranks = WarmRanks()
    yield Elastic(tmp_path_factory.mktemp("elastic"), ranks)
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair not in QUICK])
def test_the_rest_of_the_matrix(source: str, target: str, elastic: Elastic) -> None:
    resumed = elastic.resumed(source, target)
    assert resumed.one_sequence
    assert resumed.difference <= TOLERANCE
