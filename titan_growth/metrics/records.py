"""What a run records: one class per kind of line in `metrics.jsonl`, and how each field is shown.

A new metric is two edits: its field here, and the place that measures it. Sinks take everything else from the record:
keys and their order from the fields, console text and curves from each field's `metric`.

`metrics.jsonl` is the run's durable history and the file two runs are compared by. It holds four kinds of lines: one
for the data at a fresh start, one per logged training step, one per validation, one per growth. Given the same recipe,
all values except those marked `measured` come out bit for bit the same, before and after a resume. Fields with
`file=False` stay out of it.

Two rules make the lines comparable as text. A float is written with the shortest digits that read back as the same
double, so equal lines mean equal numbers. And since JSON has no NaN or infinity, a value that is not finite is written
as `null`: every JSON parser can read the line, and a `null` loss means "diverged here".
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from titan_growth.checkpoint.history import GrowthEvent
from titan_growth.metrics.formatting import COLORS, format_duration


@dataclass(frozen=True)
class Metric:
    """How a field is shown."""

    console: str = ""
    """Text on the console, with attributes of the record and colours in braces; empty: not shown."""
    tag: str = ""
    """Curve in TensorBoard and W&B; empty: no curve."""
    scale: float = 1.0
    """Factor on the curve: 100 draws a fraction as percent."""
    digits: int | None = None
    """Decimals in `metrics.jsonl`; None writes the exact value."""
    file: bool = True
    """Whether it is written to `metrics.jsonl`."""
    measured: bool = False
    """Wall-clock and speed: no second run repeats the value."""


SHADOW_LOSS = "_validation_loss"
"""Ends the key of a validation loss with shadow weights; their kind comes before."""


def shadow_losses_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Kind of shadow weights -> what a line of `metrics.jsonl` has of the loss with them."""
    return {key.removesuffix(SHADOW_LOSS): loss for key, loss in line.items() if key.endswith(SHADOW_LOSS)}


def metric(default: Any = MISSING, **shown: Any) -> Any:
    """A dataclass field with its `Metric`; see there for the arguments."""
    return field(default=default, metadata={"metric": Metric(**shown)})


@dataclass(frozen=True)
class _Column:
    name: str
    kind: type
    metric: Metric

    def json_value(self, value: Any) -> object:
        if value is None or self.kind in (str, dict, list):
            return value
        if self.kind is int:
            return int(value)
        number = float(value if self.metric.digits is None else round(value, self.metric.digits))
        return number if math.isfinite(number) else None


@functools.cache
def columns(record: Any) -> tuple[_Column, ...]:
    """The fields of a record class in their order."""
    hints = get_type_hints(record)
    found = []
    for entry in fields(record):
        hint = hints[entry.name]
        kind = get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint  # optional: the type
        kind = get_origin(kind) or kind
        found.append(_Column(entry.name, kind, entry.metadata.get("metric", Metric())))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of `metrics.jsonl`. The recorder fills in the four fields declared here.

    `tokens` and `flops` are totals since the run began, over all ranks. `seconds` is the wall-clock of the loop until
    here: validations, checkpoints and growths included; start-up, and what a kill or roll-back has undone, not.
    """

    event: ClassVar[str] = ""
    """First key of the line, where set."""
    console_head: ClassVar[str] = ""
    """How the console line begins; fields follow."""
    console_tail: ClassVar[str] = ""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = metric(math.nan, digits=3, measured=True)

    @property
    def _columns(self) -> tuple[_Column, ...]:
        kind: Any = type(self)  # mypy holds a dataclass type for unhashable
        return columns(kind)

    def to_dict(self) -> dict[str, object]:
        """The line's keys in their order, with plain JSON values. An optional field that is None is left out."""
        line: dict[str, object] = {"event": self.event} if self.event else {}
        for column in self._columns:
            value = getattr(self, column.name)
            if column.metric.file and value is not None:
                line[column.name] = column.json_value(value)
        return line

    def to_line(self) -> str:
        """The JSON text of this record, without a line end. Never contains `NaN` or `Infinity`."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def console_line(self, color: bool = False) -> str:
        """The record as one line of text for people."""
        texts = [self.console_head, *(column.metric.console for column in self._columns), self.console_tail]
        words = _Words(self, color)
        return "  ".join(text.format_map(words) for text in texts if text)

    def scalars(self) -> dict[str, float]:
        """Tag and value of every curve that this record adds a point to."""
        return {
            column.metric.tag: column.metric.scale * float(getattr(self, column.name))
            for column in self._columns
            if column.metric.tag and getattr(self, column.name) is not None
        }


class _Words:
    """What console texts may name: attributes of the record, and colours (empty unless wanted)."""

    def __init__(self, record: Record, color: bool) -> None:
        self.record = record
        self.color = color

    def __getitem__(self, name: str) -> object:
        if name in COLORS:
            return COLORS[name] if self.color else ""
        return getattr(self.record, name)


@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """One logged training step. The recorder fills in what it measures: speed, memory, time.

    `loss` is the step's mean over all ranks. `batch_hash`, where set, identifies the step's data; `skipped` says why
    the step did not move the weights.
    """

    console_head = "{cyan}step {step}/{step_total}{end}  {percent_done:.1f}%"
    console_tail = "flops {flops:.2e}  eta {eta}"

    tokens: int = metric(0, tag="n_tokens_seen")
    flops: int = metric(0, tag="flops")
    loss: float = metric(console="{green}loss {loss:.4f}{end}", tag="loss_metrics/global_avg_loss")
    grad_norm: float = metric(console="grad_norm {grad_norm:.4f}", tag="grad_norm")
    lr: float = metric(console="lr {lr:.2e}", tag="lr")
    tokens_per_second: float = metric(
        math.nan, console="{blue}{tokens_per_second:,.0f} tok/s{end}", tag="throughput(tps)", measured=True
    )
    """Of all ranks together."""
    mfu: float = metric(math.nan, console="{magenta}mfu {mfu:.1%}{end}", tag="mfu(%)", scale=100, measured=True)
    """Fraction of the hardware's peak."""
    num_layers: int = metric(tag="num_layers")
    batch_hash: str | None = None
    skipped: str | None = None
    z_loss: float | None = metric(None, tag="loss_metrics/z_loss")
    """Mean over the step's tokens, weight included; `loss` is without it."""
    qk_max_logit: float | None = metric(None, tag="qk_clip/max_logit")
    """Of all heads, before QK-clip; on the steps that it looks at."""
    qk_clipped_heads: int | None = metric(None, tag="qk_clip/clipped_heads")
    """Heads above the threshold in this step, in all layers."""

    step_seconds: float = metric(math.nan, tag="time_metrics/end_to_end(s)", file=False)
    """Mean over the steps since the last log; so are the next two."""
    data_seconds: float = metric(math.nan, tag="time_metrics/data_loading(s)", file=False)
    data_share: float = metric(math.nan, tag="time_metrics/data_loading(%)", scale=100, file=False)
    """Fraction of the step spent waiting for data."""
    memory_gib: float = metric(math.nan, console="mem {memory_gib:.2f} GiB", file=False)
    peak_memory_gib: float = metric(math.nan, tag="memory/max_active(GiB)", file=False)
    eta_seconds: float = metric(math.nan, file=False)
    step_total: int = metric(0, file=False)
    """The step the run ends at."""

    @property
    def percent_done(self) -> float:
        """Steps done, of all."""
        return 100.0 * self.step / self.step_total if self.step_total > 0 else 0.0

    @property
    def eta(self) -> str:
        """`eta_seconds` as text."""
        return format_duration(self.eta_seconds)


@dataclass(frozen=True, kw_only=True)
class ValidationRecord(Record):
    """The mean loss over the held-out set, with the weights as they were after `step`.

    With shadow weights in their place it has keys and curves of its own: `ema_validation_loss`.
    """

    console_head = (
        "{yellow}validation loss {validation_loss:.4f}{end}{beside}  at step {step}  tokens {tokens:,}  "
        "flops {flops:.2e}"
    )

    validation_loss: float = metric(tag="validation_metrics/loss")
    shadow_losses: Mapping[str, float] | None = metric(None, file=False)
    """Kind of shadow weights -> the loss with them."""

    @classmethod
    def of(cls, losses: Mapping[str, float]) -> ValidationRecord:
        """The record of losses by kind of weights; "" is the model's own."""
        shadows = {kind: loss for kind, loss in losses.items() if kind}
        return cls(validation_loss=losses[""], shadow_losses=shadows or None)

    @property
    def beside(self) -> str:
        """The losses with shadow weights, as text."""
        return "".join(f", {kind} {loss:.4f}" for kind, loss in (self.shadow_losses or {}).items())

    @property
    def losses(self) -> dict[str, float]:
        """All losses, by their keys in `metrics.jsonl`."""
        shadows = {f"{kind}{SHADOW_LOSS}": loss for kind, loss in (self.shadow_losses or {}).items()}
        return {"validation_loss": self.validation_loss, **shadows}

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {key: loss if math.isfinite(loss) else None for key, loss in self.losses.items()}

    def scalars(self) -> dict[str, float]:
        shadows = {f"validation_metrics/{kind}_loss": loss for kind, loss in (self.shadow_losses or {}).items()}
        return super().scalars() | shadows


@dataclass(frozen=True, kw_only=True)
class GrowthRecord(Record):
    """The model grew after `step`; both losses are of one held-out batch, right before and right after.

    There is deliberately no `loss` key: a reader that plots every line with a `loss` must not draw this one.
    """

    event = "growth"
    console_head = (
        "{magenta}grown {from_layers} -> {to_layers} layers at step {step}{end}: "
        "loss {loss_before:.2f} before, {loss_after:.2f} after (same held-out batch)"
    )

    from_layers: int
    to_layers: int = metric(tag="growth/num_layers")
    loss_before: float = metric(tag="growth/loss_before")
    loss_after: float = metric(tag="growth/loss_after")

    @classmethod
    def of(cls, event: GrowthEvent) -> GrowthRecord:
        """The record of a growth: every field that the event has too. A loss nobody measured is NaN."""
        known: dict[str, Any] = {}
        for name in (entry.name for entry in fields(cls) if hasattr(event, entry.name)):
            known[name] = math.nan if getattr(event, name) is None else getattr(event, name)
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class DataRecord(Record):
    """What the run trains on, and what was left out of it (`data.account`). Written once, at a fresh start.

    Readers of the other lines skip it: it has none of their keys.
    """

    event = "data"

    training_data: dict[str, Any]
    validation_data: dict[str, Any] | None = None
    """Of a validation corpus of its own."""


MEASURED = tuple(
    dict.fromkeys(
        column.name
        for kind in (StepRecord, ValidationRecord, GrowthRecord)
        for column in columns(kind)
        if column.metric.measured
    )
)
"""Keys of `metrics.jsonl` whose values no second run repeats."""
