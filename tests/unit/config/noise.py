"""A plugin with a table, as text, and what its tests do with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from titan_growth.config.loader import inspect_recipe
from titan_growth.tools.findings import Findings

HEAD = """
from typing import Literal
from pydantic import Field, field_validator
from titan_growth.config.plugins import register_table
from titan_growth.config.section import Section
"""
NOISE = (
    HEAD
    + '''
class Source(Section):
    """Where it comes from."""

    seed: int = 0
    """Where it starts."""


class Noise(Section):
    """Noise on the gradients."""

    enable: bool = False
    """Add it."""
    scale: float = Field(0.1, ge=0)
    """Standard deviation."""
    kind: Literal["gauss", "uniform"] = "gauss"
    """Distribution."""
    layers: list[str] = []
    """Where."""
    source: Source = Source()
    steps: list[Source] = []

    @field_validator("layers")
    @classmethod
    def _known(cls, value):
        if "head" in value:
            raise ValueError("'head' has no noise")
        return value


register_table("noise", Noise)
'''
)

Write = Callable[[str, str], str]


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return f"--job.config_file={path}"


def problems_of(*argv: str) -> list[str]:
    inspect_recipe(list(argv), found := Findings())
    return [str(problem) for problem in found.problems]
