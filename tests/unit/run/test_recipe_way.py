"""The way of the recipe through a start stays short: what needs a section is handed a section."""

from __future__ import annotations

import subprocess
import sys

LONGEST = 22
"""It was 40 functions before there was one start sequence."""


def test_few_functions_are_handed_a_whole_recipe() -> None:
    result = subprocess.run([sys.executable, "-m", "tests.recipe_way"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    way = [line for line in result.stdout.splitlines() if ".py:" in line]
    assert way[0] == "train.py:run"
    assert "run/start.py:resolve" in way
    assert len(way) <= LONGEST, "\n".join(way)
