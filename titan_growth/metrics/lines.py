"""Reading the files of lines that a run leaves: `metrics.jsonl`, `layers.jsonl`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from titan_growth.tools.errors import ConfigError, Problem

Parsed = TypeVar("Parsed")


def read_lines(
    file: Path, parse: Callable[[dict[str, Any]], Parsed], hint: str = "Name a run's job.dump_folder"
) -> list[Parsed]:
    """What `parse` makes of each line; a last one without an end is left out: the run is still going, or was killed.

    Args:
        parse: may raise ValueError, KeyError, TypeError, AttributeError or OverflowError for a line that is none.
        hint: for a file that cannot be read.

    Raises:
        ConfigError: when the file cannot be read, or a line is none.
    """
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "is no file")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise ConfigError([Problem(str(file), f"cannot be read ({reason})", hint)]) from None
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ConfigError([Problem(f"{file}, line {number}", "is no line of a run's metrics")]) from None
    return found
