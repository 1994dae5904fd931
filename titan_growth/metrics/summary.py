"""What the closing summary remembers of a run: its validations and growths, those before a resume included."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from titan_growth.metrics.records import GrowthRecord, Record, ValidationRecord, shadow_losses_of
from titan_growth.tools.logs import logger


class RunSummary:
    """Validations and growths of the whole run, in their order."""

    def __init__(self) -> None:
        self.validations: list[ValidationRecord] = []
        self.growths: list[GrowthRecord] = []
        self.resumed_at: int | None = None

    def add(self, record: Record) -> None:
        """Remember a record, if the summary needs it."""
        if isinstance(record, ValidationRecord):
            self.validations.append(record)
        elif isinstance(record, GrowthRecord):
            self.growths.append(record)

    def load(self, metrics_path: Path, *, resumed_at: int) -> None:
        """After a resume, read what the run did before.

        Call it on the rank that writes `metrics.jsonl`, once `JsonlSink` has cut the file back to the checkpoint. Lines
        that are not a run's are skipped.
        """
        self.resumed_at = resumed_at
        try:
            lines = metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            logger.warning("%s: the run's history cannot be read: %s", metrics_path, error.strerror or error)
            return
        for line in lines:
            try:
                self._add_line(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue

    def _add_line(self, line: dict[str, object]) -> None:
        step = int(_number(line["step"]))
        if line.get("event") == GrowthRecord.event:
            growth: dict[str, Any] = {key: int(_number(line[key])) for key in ("from_layers", "to_layers")}
            growth |= {key: _number(line[key]) for key in ("loss_before", "loss_after")}
            self.growths.append(GrowthRecord(step=step, **growth))
        elif "validation_loss" in line:
            shadows = {kind: _number(loss) for kind, loss in shadow_losses_of(line).items()}
            record = ValidationRecord.of({"": _number(line["validation_loss"]), **shadows})
            self.validations.append(replace(record, step=step))

    def lines(self) -> list[str]:
        """First, last and best validation, and every growth, one a line."""
        lines = [self._validation_line(), *self._shadow_lines()] if self.validations else []
        return lines + [
            f"growth: {growth.from_layers} -> {growth.to_layers} layers at step {growth.step}, "
            f"loss {growth.loss_before:.2f} before, {growth.loss_after:.2f} after"
            for growth in self.growths
        ]

    def _validation_line(self) -> str:
        return f"validation loss: {_facts([(one.step, one.validation_loss) for one in self.validations])}"

    def _shadow_lines(self) -> Iterator[str]:
        """The same with each kind of shadow weights."""
        for kind in self.validations[-1].shadow_losses or {}:
            losses = [(one.step, (one.shadow_losses or {}).get(kind)) for one in self.validations]
            yield f"  with {kind}: {_facts([(step, loss) for step, loss in losses if loss is not None])}"


def _facts(losses: Sequence[tuple[int, float]]) -> str:
    """First, last and best of (step, loss)."""
    # NaN compares false with everything, and a diverged validation must not become the best.
    best = min(losses, key=lambda one: (math.isnan(one[1]), one[1]))
    named = {"first": losses[0], "last": losses[-1], "best": best}
    return ", ".join(f"{name} {loss:.4f} (step {step})" for name, (step, loss) in named.items())


def _number(value: object) -> float:
    """A number read back; `null` stands for one that is not finite. Raises TypeError for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, (int, float)):
        return value
    raise TypeError(f"not a number: {value!r}")
