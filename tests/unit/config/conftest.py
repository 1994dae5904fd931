"""Plugins that are there for one test."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.config.noise import Write
from titan_growth.config import plugins


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty registry and cache for this test; stages that other tests have imported keep theirs."""
    monkeypatch.setattr(plugins, "_TABLES", {})
    monkeypatch.setattr(plugins, "_extended", functools.cache(plugins._extended.__wrapped__))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules that can be imported until the end of the test."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(name: str, text: str) -> str:
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield write
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
