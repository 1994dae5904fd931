"""Runs every bad input of `tests/recipes` through the real ./run_train.sh and writes what it answered.

    python -m tests.faults.bad_inputs [--jobs N] [PART_OF_A_NAME ...]

Without names, all cases are run (several minutes) and docs/generated/bad_inputs.md is written.
Status 1 when a case fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.recipes import bad_inputs, judge
from tests.recipes.bad_inputs import Case

PAGE = judge.CHECKOUT / "docs" / "generated" / "bad_inputs.md"
LONGEST_CELL = 400


@dataclass(frozen=True)
class Row:
    """One case with its outcome; `found` lists what is not as it should be."""

    case: Case
    status: int | None
    output: str
    found: list[str]


def run(case: Case, folder: Path, template: Path, cache: Path) -> Row:
    """Runs one case."""
    try:
        status, output, found = judge.through_run_train(case, folder, template, cache)
    except bad_inputs.NotPossibleHereError as reason:
        return Row(case, None, f"not run here: {reason}", [])
    return Row(case, status, judge.shortened(output, folder), found)


def make_template(folder: Path, cache: Path) -> Path:
    """The files that the cases start from, and the run that some resume."""
    template = bad_inputs.make_template(folder)
    environ = {**os.environ, "CONFIG_FILE": "recipe.toml", "TITAN_GROWTH_CACHE": str(cache)}
    command = [str(judge.CHECKOUT / "run_train.sh"), "--training.steps", str(bad_inputs.STEPS_DONE)]
    subprocess.run(command, cwd=template, env=environ, check=True, capture_output=True)
    return template


def message(row: Row) -> str:
    """What the user is told: error lines, or for a run that goes on the log lines that say so."""
    lines = bad_inputs.message_lines(row.output) if row.status else []
    if not lines:
        lines = [line for line in row.output.splitlines() if re.search("refused|resumed from", line)]
        lines = [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in lines]
    return "<br>".join(cell(line) for line in lines[:3] or row.output.splitlines()[-1:]) + (
        "<br>..." if len(lines) > 3 else ""
    )


def cell(text: str) -> str:
    """Text as a table cell, shortened in its middle."""
    text = re.sub(r"(\w)\1{30,}", r"\1\1\1...", text)
    if len(text) > LONGEST_CELL:
        text = f"{text[: LONGEST_CELL // 2]} ... {text[-LONGEST_CELL // 2 :]}"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def page(rows: list[Row]) -> str:
    """The page."""
    good = sum(not row.found for row in rows)
    lines = [
        "# Bad inputs",
        "",
        f"{len(rows)} things that a user can get wrong, each run through the real `./run_train.sh`; {good} of them",
        "end as they should: the expected status (2 before anything was started, 1 for a failure of a run, 0 where",
        "the run can rightly go on), one message, no traceback, and checkpoints, `metrics.jsonl` and `recipe.toml` of",
        "an existing run unchanged. Written by `tests/faults/bad_inputs.py`; the cases are in `tests/recipes/bad_*.py`",
        "and `pytest -m slow tests/faults/test_bad_inputs.py` judges them again. `...` is the case's own folder.",
        "",
        "| case | what is wrong | status | message |",
        "|---|---|---|---|",
    ]
    for row in rows:
        flaw = f" **{'; '.join(map(cell, row.found))}**" if row.found else ""
        status = "" if row.status is None else row.status
        lines.append(f"| {row.case.name} | `{cell(row.case.fragment)}` | {status} | {message(row)}{flaw} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the cases; returns 1 when one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only cases with one of these in their names; writes no page")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    args = parser.parse_args()
    cases = [case for case in bad_inputs.all_cases() if not args.names or any(part in case.name for part in args.names)]
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.jobs) as pool:
        cache = Path(root) / "cache"
        template = make_template(Path(root) / "template", cache)
        folders = [Path(root) / f"case-{number}" for number in range(len(cases))]
        rows = []
        for row in pool.map(lambda pair: run(*pair, template, cache), zip(cases, folders, strict=True)):
            print(f"{'BAD' if row.found else 'ok '} {row.status} {row.case.name} {row.found or ''}", flush=True)
            if row.found or args.names:
                print(row.output, flush=True)
            rows.append(row)
    if not args.names:
        PAGE.write_text(page(rows), encoding="utf-8")
    return int(any(row.found for row in rows))


if __name__ == "__main__":
    sys.exit(main())
