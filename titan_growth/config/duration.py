"""Points in a run, written with their unit: `"300 steps"`, `"10M tokens"`.

A bare number is refused on purpose. Whoever reads `at = 5000` in a recipe a month later cannot tell steps from tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_PATTERN = re.compile(
    r"\s*(?P<number>[0-9][0-9_,]*(?:\.[0-9]+)?)\s*(?P<suffix>[kmbt]?)\s*(?P<unit>steps?|tokens?)\s*", re.I
)


@dataclass(frozen=True)
class Duration:
    """A count from the start of the run, in optimizer steps or in tokens trained on by all ranks together."""

    value: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Reads `"300 steps"` or `"1.5B tokens"`.

        Raises:
            ValueError: with a message that says what is expected.
        """
        expected = f'expected a count with a unit, such as "300 steps" or "10M tokens", got {text!r}'
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(expected)
        unit = match["unit"].lower().rstrip("s") + "s"
        # Decimal: in binary floating point 1.001k would come to 1000.9999999999999.
        value = Decimal(match["number"].replace("_", "").replace(",", "")) * _SUFFIXES[match["suffix"].lower()]
        if value >= 2**63:
            raise ValueError(f"{value:.3g} {unit} do not fit into 64 bits")
        if value != int(value) or value < 1:
            raise ValueError(f"{expected}; it must come to a whole number of {unit}, at least 1")
        return cls(int(value), unit)

    def __str__(self) -> str:
        unit = self.unit if self.value != 1 else self.unit[:-1]
        return f"{self.value:,} {unit}"
