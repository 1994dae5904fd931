"""The default recipe on real meshes against one rank; the small model's are in `tests/distributed/test_parity.py`."""

from __future__ import annotations

import pytest

from tests.faults.parity import REAL_MESHES, STEPS, DefaultRecipe


@pytest.fixture(scope="module")
def default_recipe(tmp_path_factory: pytest.TempPathFactory) -> DefaultRecipe:
    return DefaultRecipe(tmp_path_factory.mktemp("default"), STEPS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", REAL_MESHES)
def test_a_mesh_agrees_with_one_rank(name: str, default_recipe: DefaultRecipe) -> None:
    comparison = default_recipe.on(name)
    assert comparison.holds, comparison


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_moves_agrees_with_one_rank(default_recipe: DefaultRecipe) -> None:
    """Stopped, and resumed on mesh after mesh."""
    pairs = default_recipe.moved()
    assert len(pairs) == STEPS
    assert all(pair.holds for pair in pairs), pairs
