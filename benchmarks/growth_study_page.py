"""The page of the growth study, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.arms import ROOT

PAGE = ROOT / "benchmarks" / "results" / "growth_study.md"
_INTRODUCTION = """\
# Does growing pay?

Every loss is that of a finished run: annealed over its last fifth, judged on 0.5M tokens of packages that no run has
seen. FLOPs count the whole run, base, head and attention included. `benchmarks/growth_study.py` trained the runs and
made this page; `growth_study.json` beside it has each one with its words, seed, commit and machine."""


def write_page(ends: list[dict[str, Any]]) -> None:
    """Writes the page anew."""
    PAGE.write_text(page(ends), encoding="utf-8")


def page(ends: list[dict[str, Any]]) -> str:
    """All tables, each as far as it has been trained."""
    parts = [_INTRODUCTION]
    for study, title in (("tuning", "Tuning: what the learning rate and the initial weights do to each side"),):
        chosen = [entry for entry in ends if entry["study"] == study]
        if chosen:
            parts += [f"## {title}", _table(chosen)]
    return "\n\n".join(parts) + "\n"


def _table(ends: list[dict[str, Any]]) -> str:
    """A row for every arm and budget, the best loss first within a budget."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in ends:
        rows.setdefault((entry["end"], entry["arm"]), []).append(entry)
    lines = ["| steps | arm | seeds | loss | FLOPs |", "| --- | --- | --- | --- | --- |"]
    ordered = sorted(rows.items(), key=lambda row: (row[0][0], _mean(row[1], "loss")))
    for (end, arm), found in ordered:
        losses = [entry["loss"] for entry in found]
        lines.append(f"| {end:,} | {arm} | {len(found)} | {_spread(losses)} | {_mean(found, 'flops'):.3e} |")
    return "\n".join(lines)


def _mean(entries: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(entry[key] for entry in entries)


def _spread(losses: list[float]) -> str:
    """The mean, and the range if there are several."""
    mean = f"{statistics.mean(losses):.4f}"
    return mean if len(losses) == 1 else f"{mean} ({min(losses):.4f} to {max(losses):.4f})"
