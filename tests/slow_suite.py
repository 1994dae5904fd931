"""Runs the slow tests file by file, and writes what came out as a page.

    python -m tests.slow_suite                       # files without a result, those with the fewest cases first
    python -m tests.slow_suite --only muon --again   # some, by a regular expression, although they have a result
    python -m tests.slow_suite --patience 4          # beside other work: limits of tests are four times as long
    python -m tests.slow_suite --page                # the page alone

One process for each file, so that a file that hangs costs `--minutes` and no more. Results are kept after every file,
in `benchmarks/results/slow_suite.json`: a run that is ended goes on where it was. Status 1 when a test has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

COMMAND = "python -m tests.slow_suite"
ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "slow_suite.json"
REPORT = "SLOW_SUITE_REPORT"
"""In the environment: the file for the outcomes of tests."""
TEST_SECONDS = 300
"""A test's own limit, as in pyproject.toml."""
GRACE_SECONDS = 60
"""For fixtures to end their ranks, once a file is out of time."""


@dataclass(frozen=True)
class Outcome:
    """What one process has run of a file."""

    file: str
    passed: int
    failed: int
    skipped: int
    seconds: int
    commit: str
    failures: list[str] = field(default_factory=list)
    """Names of tests that failed or had an error."""
    ended: bool = True
    """False when the file was out of time; what it had run until then is counted."""


def collect(folder: Path = ROOT) -> dict[str, int]:
    """File -> number of its slow cases."""
    command = [*_pytest(), "-qq", "--collect-only", "tests"]
    listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = {match[1]: int(match[2]) for match in re.finditer(r"^(tests/\S+\.py): (\d+)$", listed.stdout, re.M)}
    assert found, f"pytest lists no slow test:\n{listed.stdout}{listed.stderr}"
    return found


def run_file(file: str, limit_seconds: float, folder: Path = ROOT, patience: float = 1) -> Outcome:
    """Runs a file's slow tests; interrupts it when the time is up, and ends it when that does not help.

    Args:
        patience: what limits of single tests are multiplied by; `limit_seconds` is not.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {**os.environ, "PYTHONPATH": path, "TEST_PATIENCE": f"{patience:g}", REPORT: str(report)}
        command = [*_pytest(), "-p", "tests.slow_suite", "-rfE", f"--timeout={TEST_SECONDS * patience:g}", file]
        process = subprocess.Popen(command, cwd=folder, env=environ, start_new_session=True)
        ended = True
        try:
            process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            ended = False
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        words = _words(report)
    if ended and status not in (0, 1):
        words[f"pytest ended with status {status}"] = "failed"
    failures = sorted(name for name, word in words.items() if word == "failed")
    counts = Counter(words.values())
    seconds = round(time.monotonic() - began)
    return Outcome(file, counts["passed"], len(failures), counts["skipped"], seconds, _commit(folder), failures, ended)


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-n", "0", "-m", "slow"]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Adds a line for a test to the report at once; this module is a plugin of the processes it starts."""
    if report.outcome != "passed" or report.when == "call":
        with open(os.environ[REPORT], "a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid.partition("::")[2], report.outcome]) + "\n")


def _words(report: Path) -> dict[str, str]:
    """Test -> passed, failed or skipped; a failure in the test or after it counts once."""
    found: dict[str, str] = {}
    for name, word in map(json.loads, report.read_text(encoding="utf-8").splitlines() if report.exists() else ()):
        if found.get(name) != "failed":
            found[name] = word
    return found


def _commit(folder: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


# ---- the page --------------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """All files with slow tests, those without a result too."""
    cases: dict[str, int] = result["cases"]
    runs = {run["file"]: Outcome(**run) for run in result["runs"]}
    known = {file: runs[file] for file in cases if file in runs}
    total = {word: sum(getattr(run, word) for run in known.values()) for word in ("passed", "failed", "skipped")}
    seconds = sum(run.seconds for run in known.values())
    introduction = (
        f"`{result['command']}` repeats this: the tests of `pytest -m slow`, a process for each file, on "
        f"{result['machine']}, torch {result['torch']}. {total['passed']} of {sum(cases.values())} cases passed, "
        f"{total['failed']} failed, {total['skipped']} were skipped; {len(known)} of {len(cases)} files were run, in "
        f"{seconds / 60:.0f} minutes. Large tables are thinned (`tests/thinning.py`); their other cases run with "
        '`-m "slow or exhaustive"`, and are not in here.'
    )
    lines = ["# The slow suite", ""]
    for paragraph in (introduction, *result["notes"]):
        lines += [*textwrap.wrap(paragraph, 120), ""]
    lines += [
        "| file | cases | passed | failed | skipped | seconds | commit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for file in sorted(cases):
        run = known.get(file)
        values = [file, str(cases[file])]
        values += _cells(run) if run else ["not run", "", "", "", ""]
        lines.append(f"| {' | '.join(values)} |")
    failed = [f"- `{file}`: {', '.join(f'`{name}`' for name in run.failures)}" for file, run in known.items()
              if run.failures]  # fmt: skip
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def _cells(run: Outcome) -> list[str]:
    seconds = f"{run.seconds}" if run.ended else f"{run.seconds}, out of time"
    return [str(run.passed), str(run.failed), str(run.skipped), seconds, run.commit]


def save(result: dict[str, Any], path: Path = RESULT) -> None:
    """The JSON and the page beside it."""
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(result), encoding="utf-8")


def load(path: Path = RESULT) -> dict[str, Any]:
    """What is known, or nothing yet."""
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    return {"command": COMMAND, "torch": version("torch"), "machine": machine, "notes": [], "cases": {}, "runs": []}


def main(words: Sequence[str] | None = None) -> int:
    """Runs what has no result yet; returns 1 when a test of those has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose path holds this regular expression")
    parser.add_argument("--again", action="store_true", help="those that have a result too")
    parser.add_argument("--minutes", type=float, default=25, help="the limit of a file (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=1, help="what limits of single tests are multiplied by")
    parser.add_argument("--page", action="store_true", help="write the page of what is known, and run nothing")
    options = parser.parse_args(words)
    result = load()
    if options.page:
        save(result)
        return 0
    result["cases"] = collect()
    known = {run["file"] for run in result["runs"]}
    wanted = [
        file for file in result["cases"] if re.search(options.only, file) and (options.again or file not in known)
    ]
    ran: list[Outcome] = []
    for file in sorted(wanted, key=lambda file: (result["cases"][file], file)):
        ran.append(run_file(file, 60 * options.minutes, patience=options.patience))
        result["runs"] = [run for run in result["runs"] if run["file"] != file] + [asdict(ran[-1])]
        save(result)
    return int(any(outcome.failed or not outcome.ended for outcome in ran))


if __name__ == "__main__":
    sys.exit(main())
