"""What a run remembers of itself: the lines of `metrics.jsonl`.

`metrics.jsonl` is the run's durable history and the file that two runs are compared by, so it holds three kinds of
lines and nothing else: one per logged training step, one per validation and one per growth. Given the same recipe,
every value except those named in `MEASURED` comes out bit for bit the same, before and after a resume; wall-clock
facts that nobody compares runs by (step time, memory, what is left to go) are a `Timings` and stay out of the file.

Two rules make the lines comparable as text. A float is written with the shortest digits that read back as the same
double, so equal lines mean equal numbers. And since JSON has no NaN and no infinity, a value that is not finite is
written as `null`: the line stays readable by every JSON parser, and a `null` loss means exactly "it diverged here".
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

MEASURED = ("seconds", "tokens_per_second", "mfu")
"""The keys whose values no second run repeats."""


def finite_or_none(value: float) -> float | None:
    """Return `value` as a plain float, or None (JSON `null`) where it is NaN or infinite."""
    number = float(value)
    return number if math.isfinite(number) else None


class Record(ABC):
    """A line of the file."""

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """The line's keys in their order, with plain JSON values (None for a number that is not finite)."""

    def to_line(self) -> str:
        """The JSON text of this record, without a line end. Never contains `NaN` or `Infinity`."""
        return json.dumps(self.to_dict(), allow_nan=False)


@dataclass(frozen=True)
class StepRecord(Record):
    """One logged training step.

    `tokens` and `flops` are totals since the run began, over all ranks; both are written as integers. `seconds` is the
    wall-clock of the loop until here: validations, checkpoints and growths are in it, start-up is not, and neither is
    what a kill or a roll-back has undone. `loss` is the step's mean over all ranks. `tokens_per_second` is of all ranks
    together and `mfu` is a fraction of the hardware's peak (0.40 is 40 %); `MEASURED` are not reproducible.
    `batch_hash`, where set, identifies the step's data, and `skipped` says why the step did not move the weights.
    """

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    mfu: float
    num_layers: int
    batch_hash: str | None = None
    skipped: str | None = None

    def to_dict(self) -> dict[str, object]:
        line: dict[str, object] = {
            "step": int(self.step),
            "tokens": int(self.tokens),
            "flops": int(self.flops),
            "seconds": finite_or_none(round(self.seconds, 3)),
            "loss": finite_or_none(self.loss),
            "grad_norm": finite_or_none(self.grad_norm),
            "lr": finite_or_none(self.lr),
            "tokens_per_second": finite_or_none(self.tokens_per_second),
            "mfu": finite_or_none(self.mfu),
            "num_layers": int(self.num_layers),
        }
        if self.batch_hash is not None:
            line["batch_hash"] = self.batch_hash
        if self.skipped is not None:
            line["skipped"] = self.skipped
        return line


@dataclass(frozen=True)
class ValidationRecord(Record):
    """The mean loss over the held-out set, with the weights as they stood after `step`."""

    step: int
    tokens: int
    flops: float
    seconds: float
    validation_loss: float

    def to_dict(self) -> dict[str, object]:
        return {
            "step": int(self.step),
            "tokens": int(self.tokens),
            "flops": int(self.flops),
            "seconds": finite_or_none(round(self.seconds, 3)),
            "validation_loss": finite_or_none(self.validation_loss),
        }


@dataclass(frozen=True)
class GrowthRecord(Record):
    """The model became deeper after `step`; both losses are of one held-out batch, right before and right after.

    There is deliberately no `loss` key: a reader that plots every line with a `loss` must not draw this one.
    """

    step: int
    tokens: int
    flops: float
    seconds: float
    from_layers: int
    to_layers: int
    loss_before: float
    loss_after: float

    def to_dict(self) -> dict[str, object]:
        return {
            "event": "growth",
            "step": int(self.step),
            "tokens": int(self.tokens),
            "flops": int(self.flops),
            "seconds": finite_or_none(round(self.seconds, 3)),
            "from_layers": int(self.from_layers),
            "to_layers": int(self.to_layers),
            "loss_before": finite_or_none(self.loss_before),
            "loss_after": finite_or_none(self.loss_after),
        }


@dataclass(frozen=True)
class Timings:
    """Wall-clock facts that go with a logged step to the console and TensorBoard, never to `metrics.jsonl`.

    `step_seconds` is the mean time of a step since the last log and `data_seconds` the part of it spent waiting for
    data. `eta_seconds` is NaN while no estimate exists. `step_total` is the step the run ends at.
    """

    step_seconds: float
    data_seconds: float
    memory_gib: float
    peak_memory_gib: float
    eta_seconds: float
    step_total: int
