"""Pages of results say what the committed JSON beside them says."""

from __future__ import annotations

import importlib
import json

import pytest

from benchmarks import lr_transfer
from benchmarks.arms import ROOT

PAGES = ("initial_weights", "optimizers", "coordinates", "lr_transfer")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_made_of_its_json(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    result = json.loads(module.RESULT.read_text(encoding="utf-8"))
    page = ROOT / "benchmarks" / "results" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == module.page(result)
    assert result["runs"]


def test_learning_rates_across_sizes() -> None:
    """What the base's best rate costs at another size, and a best one at the edge of the grid."""
    losses = {(64, 2, 1e-3): 4.0, (64, 2, 2e-3): 3.5, (64, 2, 4e-3): 3.7,
              (128, 2, 1e-3): 3.2, (128, 2, 2e-3): 3.3, (128, 2, 4e-3): 3.9}  # fmt: skip
    runs = [
        {"parametrization": "mup", "optimizer": "AdamW", "steps": 300, "dim": dim, "layers": layers, "lr": lr,
         "seed": 1, "loss": loss}
        for (dim, layers, lr), loss in losses.items()
    ]  # fmt: skip
    page = lr_transfer.page({"command": "x", "torch": "2", "runs": runs})
    assert "| 64 | 2 | 4.000 | 3.500 | 3.700 | 0.002 | +0.000 |" in page
    assert "| 128 | 2 | 3.200 | 3.300 | 3.900 | 0.001* | +0.100 |" in page
    assert "## standard" not in page


@pytest.mark.parametrize(
    ("losses", "rate"),
    [([3.0, 2.0, 2.5], None), ([2.0, 2.1, 2.5], 0.5), ([3.0, 2.2, 2.1], 8.0)],
    ids=["no", "down", "up"],
)
def test_a_grid_is_extended_beyond_its_best_rate(losses: list[float], rate: float | None) -> None:
    assert lr_transfer.beyond(dict(zip([1.0, 2.0, 4.0], losses, strict=True))) == rate
