"""Points in a run, written with their unit: `"300 steps"`, `"10M tokens"`, `"3e17 FLOPs"`, `"25%"`, `"auto"`,
`"slope 0.02 over 200 steps"`.

A bare number is refused: `at = 5000` does not say whether steps or tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBER = r"(?P<number>[0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)"
_COUNT = re.compile(rf"\s*{_NUMBER}\s*(?P<suffix>[kmbt]?)\s*(?P<unit>steps?|tokens?|flops?)\s*", re.I)
_PERCENT = re.compile(r"\s*(?P<number>[0-9]+(?:\.[0-9]+)?)\s*%(?:\s+of\s+the\s+run)?\s*", re.I)
_SLOPE = re.compile(
    r"\s*slope\s+(?P<number>[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)\s+over\s+(?P<window>[0-9]+)\s+steps\s*", re.I
)

UNITS = {"step": "steps", "token": "tokens", "flop": "FLOPs"}
MOST_WINDOW_STEPS = 10_000


@dataclass(frozen=True)
class Duration:
    """A point in a run, counted from its start over all ranks.

    unit is "steps", "tokens", "FLOPs", "percent" (of the run's steps), "auto" (value 0) or "slope" (reached when the
    loss has fallen by less than value, in nats over the last `window` steps).
    """

    value: int | Decimal
    unit: str
    window: int = 0

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Reads a point.

        Raises:
            ValueError: with a message that says what is expected.
        """
        expected = (
            'expected a count with a unit, such as "300 steps" or "10M tokens" (or FLOPs, "25%", "auto", '
            f'"slope 0.02 over 200 steps"), got {text!r}'
        )
        if text.strip().lower() == "auto":
            return cls(0, "auto")
        if match := _PERCENT.fullmatch(text):
            share = Decimal(match["number"])
            if not 0 < share < 100:
                raise ValueError(f"{expected}; a share of the run lies between 0% and 100%")
            return cls(share, "percent")
        if match := _SLOPE.fullmatch(text):
            window = int(match["window"])
            if not 2 <= window <= MOST_WINDOW_STEPS:
                raise ValueError(f"{expected}; a slope needs 2 to {MOST_WINDOW_STEPS:,} steps")
            return cls(Decimal(match["number"]), "slope", window)
        match = _COUNT.fullmatch(text)
        if match is None:
            raise ValueError(expected)
        unit = UNITS[match["unit"].lower().rstrip("s")]
        # Decimal, since 1.001 * 1000 == 1000.9999999999999 in binary.
        value = Decimal(match["number"].replace("_", "").replace(",", "")) * _SUFFIXES[match["suffix"].lower()]
        if value >= 2**63 and unit != "FLOPs":
            raise ValueError(f"{value:.3g} {unit} do not fit into 64 bits")
        if value != int(value) or value < 1:
            raise ValueError(f"{expected}; it must come to a whole number of {unit}, at least 1")
        return cls(int(value), unit)

    @property
    def count(self) -> int:
        """The value of a point that is a count."""
        assert isinstance(self.value, int), f"'{self}' is no count"
        return self.value

    def __str__(self) -> str:
        if self.unit == "percent":
            return f"{self.value}%"
        if self.unit == "auto":
            return "auto"
        if self.unit == "slope":
            return f"slope {self.value} over {self.window} steps"
        if self.unit == "FLOPs" and self.value >= 10**9:
            return f"{Decimal(self.value).normalize():e} FLOPs".replace("e+", "e")
        unit = self.unit if self.value != 1 else self.unit[:-1]
        return f"{self.value:,} {unit}"
