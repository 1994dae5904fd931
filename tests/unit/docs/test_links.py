"""Links lead somewhere: between pages, to their headings, and from code and messages to pages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.unit.docs.pages import ROOT, is_generated, name_of, pages

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
DOCS_PATH = re.compile(r"(?<![\w/.])docs/[\w./-]*\w")
SOURCES = (".py", ".toml", ".sh", ".md", ".c", ".yml", ".yaml")
WIDTH = 120
WRITTEN = {"recipe.toml", "logit_cap.py", "sandwich.py", "lion.py", "config.json"}
"""Files of a run, and the examples of plugins."""


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def sources() -> list[Path]:
    """What is tracked, or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    return [file for file in files if file.is_file() and file.suffix in SOURCES]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_relative_links_exist(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading: `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](gone.md) [c](other.md#a-heading-code) [d](other.md#gone) [e](https://x.y/z) `[f](gone.md)`\n"
        "```\n[g](gone.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "other.md#gone"]


def test_pages_named_in_code_exist() -> None:
    """Docstrings, comments, messages and tests call pages docs/..., from the root of the checkout."""
    missing = {
        f"{name_of(file)}: {path}"
        for file in sources()
        for path in DOCS_PATH.findall(file.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    }
    assert missing == set()


@pytest.mark.parametrize("page", [page for page in pages() if not is_generated(page)], ids=name_of)
def test_files_named_on_pages_exist(page: Path) -> None:
    """`growth/read.py`, from the checkout, from the package, or beside what the page is about."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = {
        name for span in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"[\w/]+\.(?:py|toml|txt|c)\b", span)
    }
    roots = (ROOT, ROOT / "titan_growth", ROOT / "benchmarks", *(ROOT / "tests").rglob("."))
    missing = {name for name in named - WRITTEN if not any((root / name).exists() for root in roots)}
    assert missing == set()


def test_no_document_outside_the_project_is_cited() -> None:
    """The words are put together here, or this file would cite them itself."""
    outside = [f"{name}.md" for name in ("design", "house")] + ["../" + "shared"]
    cited = [f"{name_of(file)}: {word}" for file in sources() for word in outside if word in file.read_text()]
    assert cited == []


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text()) if "://" not in target}
    assert {page for page in pages() if "docs" in page.relative_to(ROOT).parts} - {index} <= linked


def test_the_readme_names_every_folder_and_module_once() -> None:
    text = (ROOT / "README.md").read_text()
    listing = text.split("## Where things are")[1].split("```")[1]
    package = ROOT / "titan_growth"
    there = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    there |= {path.name for path in package.glob("*.py")} - {"__init__.py"}
    named = re.findall(r"^  ([\w.]+/?) ", listing, re.M)
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", [page for page in pages() if not is_generated(page)], ids=name_of)
def test_lines_are_not_longer_than_120(page: Path) -> None:
    """Prose and code. Rows of tables and lines with a link may be longer, but not in the README's code."""
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH and not _may_be_long(page, line)]
    assert long == []


def _may_be_long(page: Path, line: str) -> bool:
    is_readme = page == ROOT / "README.md"
    return bool(LINK.search(line)) or (not is_readme and line.lstrip().startswith("|"))
