"""Memory that may still be taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_growth.tools import memory
from titan_growth.tools.memory import available_bytes


def test_the_smaller_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    1000 kB\n")
    assert available_bytes() == 1_024_000
    container = {"memory.max": "max", "memory.current": "500", "memory.stat": "anon 1\ninactive_file 20\n"}
    for name, content in container.items():
        (tmp_path / name).write_text(content)
    assert available_bytes() == 1_024_000
    (tmp_path / "memory.max").write_text("700\n")
    assert available_bytes() == 220


def test_this_machine_tells() -> None:
    available = available_bytes()
    assert available is None or available > 1 << 20
