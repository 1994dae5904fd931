"""A metric of `layers.jsonl` over the steps of a run, for `titan_growth plot --layers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_growth.config.fields import suggestion
from titan_growth.metrics.lines import read_lines
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.run_folder import LAYERS_FILE, METRICS_FILE

_HINT = "Name the job.dump_folder of a run with metrics.layers_freq or metrics.attention_freq"

Table = dict[str, dict[str, "list[float | None] | float | None"]]
"""Metric -> group -> a value for each layer, or one; None for one that is not finite."""


@dataclass(frozen=True)
class Line:
    """What is drawn of a line of `layers.jsonl`."""

    step: int
    layers: Table

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Line:
        """Raises ValueError, KeyError, TypeError or AttributeError for what is no such line."""
        layers = {
            metric: {
                group: [_number(one) for one in values] if isinstance(values, list) else _number(values)
                for group, values in by_group.items()
            }
            for metric, by_group in entry["layers"].items()
        }
        return cls(int(entry["step"]), layers)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


@dataclass(frozen=True)
class LayerCurves:
    """One metric over the steps on which it was measured."""

    metric: str
    steps: tuple[int, ...]
    groups: dict[str, list[list[float | None]]]
    """Group -> for each step a value by layer; one value for a group around the layers."""
    growths: tuple[int, ...]
    """Steps after which the model grew."""

    around: frozenset[str] = frozenset()
    """Groups that lie around the layers."""


def read_layer_curves(folder: Path, wanted: str) -> LayerCurves:
    """The curves of a metric, or of one of its groups.

    Args:
        folder: a run's `job.dump_folder`.
        wanted: METRIC, or METRIC.GROUP.

    Raises:
        ConfigError: when the run's files cannot be read, or have no such metric.
    """
    lines = read_lines(folder / LAYERS_FILE, Line.of, _HINT)
    metric, _, group = wanted.partition(".")
    own = [line for line in lines if metric in line.layers]
    groups = list(dict.fromkeys(name for line in own for name in line.layers[metric] if group in ("", name)))
    if not groups:
        raise ConfigError([_unknown(wanted, lines)])
    values = {name: [line.layers[metric].get(name) for line in own] for name in groups}
    around = frozenset(name for name, ones in values.items() if not any(isinstance(one, list) for one in ones))
    as_lists = {name: [one if isinstance(one, list) else [one] for one in ones] for name, ones in values.items()}
    grown = read_lines(folder / METRICS_FILE, _grown_at) if (folder / METRICS_FILE).is_file() else []
    steps = tuple(step for step in grown if step is not None)
    return LayerCurves(metric, tuple(line.step for line in own), as_lists, steps, around)


def _unknown(wanted: str, lines: list[Line]) -> Problem:
    tables = [(metric, list(by_group)) for line in lines for metric, by_group in line.layers.items()]
    names = [name for metric, groups in tables for name in (metric, *(f"{metric}.{group}" for group in groups))]
    there = ", ".join(dict.fromkeys(metric for metric, _ in tables))
    hint = suggestion(wanted, names) or (f"It has {there}" if there else "The run has measured none yet")
    return Problem("--layers", f"the run has no metric '{wanted}'", hint)


def _grown_at(entry: dict[str, Any]) -> int | None:
    return int(entry["step"]) if entry.get("event") == "growth" else None
