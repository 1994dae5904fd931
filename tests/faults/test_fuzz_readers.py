"""Files damaged at random: read, or refused with one message, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz_readers import Report, fuzz, good_files, outcome_of

PEAK_BYTES = 1 << 29
"""A worker has a quarter of it before it reads anything."""


def judge(report: Report, num_cases: int) -> None:
    print("\n".join(report.lines()))
    assert not report.wrong, "\n".join(report.wrong)
    counts = [sum(counts.values()) for counts in report.counts.values()]
    assert sum(counts) == num_cases
    assert report.peak_bytes < PEAK_BYTES


def test_a_hundred_damaged_files(tmp_path: Path) -> None:
    judge(fuzz(100, 0, tmp_path / "fuzz"), 100)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_thousand_damaged_files(tmp_path: Path) -> None:
    judge(fuzz(5000, 0, tmp_path / "fuzz"), 5000)


def test_the_files_are_good_before_they_are_damaged(tmp_path: Path) -> None:
    for name, content in good_files().items():
        (tmp_path / name).write_bytes(content)
        assert outcome_of(tmp_path / name, 0) == ("read", ""), name
