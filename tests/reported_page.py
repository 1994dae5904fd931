"""Writes docs/generated/reported_bugs.md: bug reports of other trainers, and what happens here.

python -m tests.reported_page
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from tests.reported.reports import Report, areas

COMMAND = "python -m tests.reported_page"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "generated" / "reported_bugs.md"
FOLDER = "tests/reported/"


def page() -> str:
    """The whole page."""
    reports = [report for rows in areas().values() for report in rows]
    projects = {report.project for report in reports}
    ids = {test for report in reports for test in report.tests}
    num_own = sum(test.startswith(FOLDER) for test in ids)
    introduction = (
        f"{len(reports)} public bug reports of {len(projects)} projects, each tried here in small: what went wrong "
        f"there, what happens here, and the tests that show it. {num_own} of the {len(ids)} tests were written for a "
        f"report and carry its number; they are in `{FOLDER}`, and `tests/reported/reports.py` is the register. A "
        "report is named as `owner/repository#number`; several in a row are of one fault. What is told is the report."
    )
    lines = ["# Bugs of others, as tests", "", *textwrap.wrap(introduction, 120), ""]
    lines += [f"Generated from `tests/reported/` by `{COMMAND}`.", ""]
    for area, rows in areas().items():
        lines += [f"## {area}", "", "| report | there | here | tests |", "| --- | --- | --- | --- |"]
        lines += [*map(_row, rows), ""]
    return "\n".join(lines)


def _row(report: Report) -> str:
    names = ", ".join([report.name, *report.also])
    tests = "<br>".join(f"`{test.replace(FOLDER, '')}`" for test in report.tests)
    return f"| {names} | {_cell(report.there)} | {_cell(report.here)} | {tests} |"


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
