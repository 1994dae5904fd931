"""The page of the slow suite is what was counted."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests import harness, slow_suite

TESTS = """
import time
import pytest

pytestmark = pytest.mark.slow

@pytest.fixture
def broken_afterwards():
    yield
    raise OSError

@pytest.mark.parametrize("number", range(3))
def test_passes(number): pass

def test_fails(): assert False

def test_is_skipped(): pytest.skip("here")

def test_has_an_error_afterwards(broken_afterwards): pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n")
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    return tmp_path


def test_a_file_is_counted(checkout: Path) -> None:
    assert slow_suite.collect(checkout) == {"tests/test_some.py": 6}
    found = slow_suite.run_file("tests/test_some.py", 60, checkout)
    assert (found.passed, found.failed, found.skipped, found.ended) == (3, 2, 1, True)
    assert found.failures == ["test_fails", "test_has_an_error_afterwards"]


def test_a_file_that_is_out_of_time_keeps_what_it_had(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = checkout / "hangs"
    (checkout / "tests" / "test_some.py").write_text(
        f"{TESTS}\ndef test_hangs():\n    open({str(hangs)!r}, 'w').close()\n    time.sleep(600)\n"
    )

    class OutOfTime(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 1234:  # time is up when the last test hangs, however busy the machine is
                while not hangs.exists():
                    assert self.poll() is None
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired("pytest", timeout)
            return super().wait(timeout)

    monkeypatch.setattr(slow_suite.subprocess, "Popen", OutOfTime)
    found = slow_suite.run_file("tests/test_some.py", 1234, checkout)
    assert (found.passed, found.failed, found.skipped, found.ended) == (3, 2, 1, False)


def test_a_file_that_cannot_be_imported_has_failed(checkout: Path) -> None:
    (checkout / "tests" / "test_some.py").write_text("import nothing_of_this_name\n")
    assert slow_suite.run_file("tests/test_some.py", 60, checkout).failures == ["pytest ended with status 2"]


def test_a_page_says_what_was_not_run() -> None:
    outcome = {"file": "tests/a.py", "passed": 1, "failed": 1, "skipped": 0, "seconds": 5, "commit": "abc"}
    result = {"command": "x", "torch": "2", "machine": "a machine", "notes": ["A note."],
              "cases": {"tests/b.py": 3, "tests/a.py": 2},
              "runs": [{**outcome, "failures": ["test_c"], "ended": False}]}  # fmt: skip
    page = slow_suite.page(result)
    assert "| tests/a.py | 2 | 1 | 1 | 0 | 5, out of time | abc |\n| tests/b.py | 3 | not run |" in page
    assert "1 of 5 cases passed, 1 failed" in page.replace("\n", " ")
    assert "- `tests/a.py`: `test_c`" in page
    assert "\nA note.\n" in page


def test_the_page_is_made_of_its_json() -> None:
    result = json.loads(slow_suite.RESULT.read_text(encoding="utf-8"))
    assert slow_suite.RESULT.with_suffix(".md").read_text(encoding="utf-8") == slow_suite.page(result)
    assert result["runs"]


PATIENT = """
import os
import pytest

@pytest.mark.slow
def test_it_is_patient(request):
    assert os.environ["TEST_PATIENCE"] == "4"
    assert request.config.getoption("--timeout") == 1200
"""


def sleep_for(rank: int, seconds: float) -> None:
    time.sleep(seconds)


def test_limits_are_as_patient_as_one_likes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "tests" / "test_some.py").write_text(PATIENT)
    assert slow_suite.run_file("tests/test_some.py", 60, checkout, patience=4).passed == 1
    monkeypatch.setattr(harness, "PATIENCE", 0.001)
    with pytest.raises(AssertionError, match=r"0 of 1 ranks were done within 0\.09 s"):
        harness.run_ranks(sleep_for, 1, 5)
