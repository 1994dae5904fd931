"""Every bad input through the real ./run_train.sh."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.bad_inputs import make_template, run
from tests.recipes import bad_inputs
from tests.recipes.bad_inputs import Case


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-inputs-cache")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return make_template(tmp_path_factory.mktemp("bad-inputs") / "template", cache)


@pytest.mark.slow
@pytest.mark.parametrize("case", bad_inputs.all_cases(), ids=lambda case: case.name)
def test_it_ends_with_one_message(case: Case, tmp_path: Path, template: Path, cache: Path) -> None:
    row = run(case, tmp_path / "case", template, cache)
    if row.status is None:
        pytest.skip(row.output)
    assert not row.found, row.output
