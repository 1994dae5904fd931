"""The file that the growth study keeps: ends that have been trained, each for good, and ends trained once more."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from titan_growth.tools.files import write_atomic

_writing = threading.Lock()


def read_results(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists "ends" and "repeats", which were trained once more; empty before the first end."""
    if not path.exists():
        return {"ends": [], "repeats": []}
    read: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    return read


def append_result(path: Path, kind: str, entry: dict[str, Any]) -> None:
    """Adds an end to one of the lists, a line for each."""
    with _writing:
        read = read_results(path)
        read[kind].append(entry)
        lists = (f'"{name}": [\n' + ",\n".join(map(json.dumps, entries)) + "\n]" for name, entries in read.items())
        write_atomic(path, "{" + ",\n".join(lists) + "}\n")
