"""The pages written for people, and the blocks of code on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]


def pages() -> list[Path]:
    """README and all of docs/, CONTRIBUTING and CHANGELOG, and the pages of benchmarks/ and tests/."""
    folders = ("docs", "benchmarks", "tests")
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in ROOT.glob(f"{folder}/**/*.md"))])


def is_generated(path: Path) -> bool:
    """Whether a script writes the page."""
    return path.parent.name in ("generated", "results") or path.name == "recipe.md"


def name_of(path: Path) -> str:
    """A page's path as tests and people call it."""
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The fenced blocks of README, CONTRIBUTING and docs/ in these languages."""
    found = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.M | re.S):
            if match[1] in languages:
                found.append(Block(name_of(path), text[: match.start()].count("\n") + 2, match[1], match[2]))
    return found
