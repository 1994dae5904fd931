"""`layers.jsonl`: what the layers do, one line for each step on which that was measured.

A file of its own beside `metrics.jsonl`, because one line has thousands of numbers, which everything that reads the
other file would have to step over. Lines are in the order of steps, so a resume cuts the file back to the checkpoint's
step; no checkpoint needs to know of it. Numbers have seven significant digits.

    {"step": 20, "tokens": ..., "flops": ..., "seconds": ...,
     "layers": {"gradient_norm": {"attention": [a number for each layer], "embedding": a number, ...}, ...},
     "new_layers": [3, 4, 5], "means": {"gradient_norm": {"attention": {"copied": ..., "new": ...}}}}

The last two are there after a growth. `new_layers` are those that the last growth added, be it as further copies or
from their initial distribution. The others are the small model's layers, called copied; after a growth in width alone
all of them are, each with new channels in it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_growth.growth.operators.base import GrowthMap
from titan_growth.metrics.records import Record

if TYPE_CHECKING:  # the recorder is imported without torch
    from titan_growth.models.layer_groups import ByGroup

Value = float | None
"""None for a number that is not finite, as in `metrics.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class LayersRecord(Record):
    """A line of `layers.jsonl`."""

    layers: dict[str, Any]
    """Metric -> group -> a value for each layer, or one value for what lies around the layers."""
    new_layers: list[int] | None = None
    means: dict[str, Any] | None = None
    """Metric -> group -> "copied" and "new" -> the mean over these layers."""

    @classmethod
    def of(cls, by_metric: Mapping[str, ByGroup], growth: GrowthMap | None) -> LayersRecord:
        """The record of measured numbers.

        Args:
            growth: the last one, None for a model that has not grown.
        """
        layers = {
            metric: {group: _rounded_all(values) for group, values in by_group.items()}
            for metric, by_group in by_metric.items()
        }
        if growth is None:
            return cls(layers=layers)
        kinds = ["copied" if original else "new" for original in growth.is_original_layer]
        means = {
            metric: {group: _means(values, kinds) for group, values in by_group.items() if isinstance(values, list)}
            for metric, by_group in by_metric.items()
        }
        return cls(layers=layers, new_layers=[at for at, kind in enumerate(kinds) if kind == "new"], means=means)

    def scalars(self) -> dict[str, float]:
        """A curve for each number: `layers_METRIC/GROUP.LAYER`, and `layers_METRIC/GROUP.new`."""
        found: dict[str, Value] = {}
        for metric, by_group in self.layers.items():
            for group, values in by_group.items():
                tag = f"layers_{metric}/{group}"
                if isinstance(values, list):
                    found |= {f"{tag}.{layer:03d}": value for layer, value in enumerate(values)}
                else:
                    found[tag] = values
        for metric, by_group in (self.means or {}).items():
            for group, means in by_group.items():
                found |= {f"layers_{metric}/{group}.{kind}": value for kind, value in means.items()}
        return {tag: math.nan if value is None else value for tag, value in found.items()}


def _rounded_all(values: list[float] | float) -> list[Value] | Value:
    return [_rounded(value) for value in values] if isinstance(values, list) else _rounded(values)


def _rounded(value: float) -> Value:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _means(values: list[float], kinds: list[str]) -> dict[str, Value]:
    return {
        kind: _rounded(statistics.fmean(value for value, own in zip(values, kinds, strict=True) if own == kind))
        for kind in dict.fromkeys(kinds)
    }


def offset_after(path: Path, step: int) -> int:
    """Bytes of the file up to the last line of a step no later than this one; 0 without a file."""
    offset = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or _step_of(line) > step:
                    break
                offset += len(line)
    except OSError:
        return 0  # the sink that opens it next says why
    return offset


def _step_of(line: bytes) -> float:
    """The step of a line; one that is not ours is cut off, and so is all that follows."""
    try:
        entry = json.loads(line)
        return float(entry["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
