"""Pages of results say what the committed JSON beside them says."""

from __future__ import annotations

import importlib
import json

import pytest

from benchmarks.arms import ROOT

PAGES = ("initial_weights", "optimizers")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_made_of_its_json(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    result = json.loads(module.RESULT.read_text(encoding="utf-8"))
    page = ROOT / "benchmarks" / "results" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == module.page(result)
    assert result["runs"]
