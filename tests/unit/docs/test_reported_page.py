"""The register of others' bugs: the page equals it, every test of it exists, and every test there is in it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from tests import reported_page
from tests.reported.reports import Report, areas
from tests.unit.docs.pages import ROOT

REPORTS: list[Report] = [report for rows in areas().values() for report in rows]
REFERENCE = re.compile(r"[\w.-]+/[\w.-]+#[1-9]\d*")


def functions_of(file: Path) -> list[str]:
    return [
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_the_page_is_up_to_date() -> None:
    written = reported_page.PAGE.read_text(encoding="utf-8")
    assert written == reported_page.page(), f"{reported_page.PAGE.name} is stale. Run: {reported_page.COMMAND}"


def test_every_test_of_the_register_exists() -> None:
    missing = []
    for test in {test for report in REPORTS for test in report.tests}:
        file, _, function = test.partition("::")
        if not (ROOT / file).is_file() or function not in functions_of(ROOT / file):
            missing.append(test)
    assert missing == []


def test_every_test_of_the_folder_is_in_the_register_and_named_after_its_report() -> None:
    files = sorted((ROOT / "tests" / "reported").glob("test_*.py"))
    there = {f"tests/reported/{file.name}::{function}" for file in files for function in functions_of(file)}
    numbers: dict[str, list[int]] = {}
    for report in REPORTS:
        for test in report.tests:
            if test.startswith("tests/reported/"):
                numbers.setdefault(test, []).append(report.number)
    assert numbers.keys() == there
    misnamed = [test for test, of in numbers.items() if not any(f"_{number}_" in test for number in of)]
    assert misnamed == []


def test_reports_are_named_once() -> None:
    names = [name for report in REPORTS for name in (report.name, *report.also)]
    assert [name for name in names if not REFERENCE.fullmatch(name)] == []
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(REPORTS) >= 50
    assert all(report.tests and report.there.endswith(".") and report.here.endswith(".") for report in REPORTS)
