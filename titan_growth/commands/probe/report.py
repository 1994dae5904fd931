"""The result of a probe: one row for each candidate, best first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from titan_growth.checkpoint.manifest import Manifest
from titan_growth.models.config import DecoderConfig


@dataclass(frozen=True)
class Outcome:
    """How a candidate did."""

    name: str
    num_layers: int
    num_params: int
    loss_before: float | None = None
    """On one held-out batch, right before the growth; None without a growth."""
    loss_after: float | None = None
    """On the same batch, right after."""
    loss: float = math.nan
    """At the end: on the validation set, or of the last batch."""
    validated: bool = False
    tokens: int = 0
    """Since the checkpoint, including those of a learning phase."""
    flops: float = math.nan
    """Since the checkpoint."""
    seconds: float = math.nan
    """Since the checkpoint, without start-up."""
    failure: str = ""


def outcome_of(
    name: str, config: DecoderConfig, lines: Sequence[dict[str, Any]], start: Manifest, failure: str
) -> Outcome:
    """The outcome of a run, by its metrics.

    Args:
        lines: of its metrics.jsonl.
        start: of the checkpoint it continued from.
        failure: why it ended early, or empty.
    """
    sizes = (name, config.num_layers, config.num_params)
    growth = next((line for line in lines if line.get("event") == "growth"), {})
    losses = (growth.get("loss_before"), growth.get("loss_after"))
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation_loss" in line]
    if failure or not steps:
        return Outcome(*sizes, *losses, failure=failure or "it left no metrics")
    last = steps[-1]
    validated = bool(validations) and validations[-1]["step"] == last["step"]
    loss = validations[-1]["validation_loss"] if validated else last["loss"]
    return Outcome(
        *sizes,
        *losses,
        loss=math.nan if loss is None else loss,
        validated=validated,
        tokens=last["tokens"] - start.progress.tokens,
        flops=last["flops"] - start.progress.flops,
        seconds=last["seconds"] - start.seconds,
    )


def report(outcomes: Sequence[Outcome], steps: int, source: str) -> Iterator[str]:
    """The lines of the report."""
    ended = [one for one in outcomes if not one.failure]
    # NaN (diverged) compares false with everything; it ranks last.
    ended.sort(key=lambda one: math.inf if math.isnan(one.loss) else one.loss)
    by = "validation loss" if any(one.validated for one in ended) else "loss of the last batch"
    width = max((len(one.name) for one in outcomes), default=0)
    yield ""
    yield f"{steps} steps from {source}, ranked by {by}:"
    yield ""
    yield (
        f"{'':4} {'candidate':{width}} {'layers':>6} {'parameters':>14} {'before':>8} {'grown':>8} "
        f"{'at end':>8} {'tokens':>12} {'FLOPs':>9} {'seconds':>8}"
    )
    place = 0
    for one in ended:
        place += one.loss_after is not None
        rank = f"{place}." if one.loss_after is not None else ""
        yield (
            f"{rank:4} {one.name:{width}} {one.num_layers:6} {one.num_params:14,} {_loss(one.loss_before)} "
            f"{_loss(one.loss_after)} {_loss(one.loss)} {one.tokens:12,} {one.flops:9.2e} {one.seconds:8.1f}"
        )
    for one in outcomes:
        if one.failure:
            yield f"{'-':4} {one.name:{width}} failed: {one.failure}"
    yield ""
    yield "before, grown: loss of one held-out batch just before and just after the growth."
    if len({one.tokens for one in ended}) > 1:
        yield "Not all were trained on the same number of tokens (a learning phase, or a batch of their own)."


def _loss(value: float | None) -> str:
    if value is None:
        return f"{'':8}"
    return f"{'diverged':>8}" if math.isnan(value) else f"{value:8.4f}"
