"""JSON tables with a checksum of themselves: else a flipped bit leaves a well-formed table of other values."""

from __future__ import annotations

import hashlib
import json
from typing import Any

SEAL = "sha256"
"""Key of the checksum."""


def sealed(table: dict[str, Any]) -> str:
    """The text of a table with its checksum."""
    table = {key: value for key, value in table.items() if key != SEAL}
    return json.dumps({**table, SEAL: seal_of(table)}, indent=1) + "\n"


def seal_of(table: dict[str, Any]) -> str:
    """SHA-256 of a table's content, independent of its formatting."""
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
