"""What changes over a run: the learning rate and the batch, in steps or tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from titan_growth.config.duration import Duration
from titan_growth.config.section import BadValueError, Section

LENGTHS = {"warmup": "warmup_steps", "decay": "decay_ratio", "total": "total_steps"}
"""Lengths of a schedule with a unit -> torchtitan's key, which each stands in for."""


def in_steps_or_tokens(value: str) -> str:
    """A validator's: a length as the recipe gives it. Raises BadValueError for one in anything else."""
    if Duration.parse(value).unit not in ("steps", "tokens"):
        raise BadValueError(f"must be in steps or tokens, got '{value}'", 'For example "10M tokens"')
    return value


class LRSchedulerConfig(Section):
    """Linear warmup, an optional stable phase, a decay; growth may restart it (growth.stages.lr_policy)."""

    warmup_steps: int = Field(200, ge=0)
    """Steps of linear warmup; clamped, with a warning, to the length of the run."""
    total_steps: int | None = Field(None, ge=1)
    """Length the schedule is laid out to. Default: training.steps."""
    decay_ratio: float | None = Field(None, ge=0, le=1)
    """Share of the schedule spent decaying (warmup-stable-decay). Default: decay starts right after warmup."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: float = Field(0.0, ge=0, le=1)
    """The decay ends at lr times this."""
    warmup: str | None = None
    """Instead of warmup_steps, with a unit: "2M tokens" or "300 steps". It ends with the step that reaches its tokens,
    masked positions included. Not a key of torchtitan; nor are decay and total."""
    decay: str | None = None
    """Instead of decay_ratio: the last "20M tokens" or "500 steps" of the schedule, in whole steps."""
    total: str | None = None
    """Instead of total_steps: "1B tokens"."""

    @field_validator(*LENGTHS)
    @classmethod
    def _is_a_count(cls, value: str | None) -> str | None:
        return value if value is None else in_steps_or_tokens(value)

    @model_serializer(mode="wrap")
    def _what_is_in_force(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """warmup_steps has a default, which would stand beside `warmup` in a saved recipe."""
        table: dict[str, Any] = handler(self)
        if self.warmup is not None:
            table.pop("warmup_steps", None)
        return table

    @property
    def in_tokens(self) -> list[str]:
        """The keys of lengths given in tokens."""
        lengths = {f"lr_scheduler.{name}": getattr(self, name) for name in LENGTHS}
        return [key for key, text in lengths.items() if text is not None and Duration.parse(text).unit == "tokens"]


class BatchSizeConfig(Section):
    """A change of the batch: when, and to how many sequences."""

    at: str
    """The step or the tokens after which it holds, from the start of the run: "300 steps", "10M tokens"."""
    global_batch_size: int = Field(ge=1)
    """Sequences of a step from then on; a multiple of local_batch_size x data-parallel degree."""

    @field_validator("at")
    @classmethod
    def _at_is_a_count(cls, value: str) -> str:
        return in_steps_or_tokens(value)

    @property
    def when(self) -> Duration:
        """The parsed `at`."""
        return Duration.parse(self.at)
