"""The `[growth]` table: how the run gets from a small model to the one that `[model]` names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from titan_growth.config.duration import Duration
from titan_growth.config.section import Section


class GrowthStage(Section):
    """One growth: when, by which operator, and what becomes of moments and learning rate."""

    at: str
    """When to grow, counted from the start of the run: "300 steps" or "10M tokens"."""
    operator: str = "stack"
    """Growth operator; "stack" repeats the whole list of layers factor times (G_stack)."""
    factor: int = Field(ge=2)
    """How many times as many layers as before."""
    optimizer_state: Literal["reset", "copy"] = "reset"
    """What becomes of the moments: zero again (official G_stack), or copied along with the weights."""
    lr_policy: Literal["restart", "continue"] = "restart"
    """restart = warmup again and a decay to the run's end (official G_stack); continue = the ungrown run's curve."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate from this growth on. Default: optimizer.lr after a restart, else the peak stays."""
    warmup_steps: int | None = Field(None, ge=0)
    """Warmup after this growth (lr_policy = "restart"). Default: lr_scheduler.warmup_steps."""

    @field_validator("at")
    @classmethod
    def _at_has_a_unit(cls, value: str) -> str:
        Duration.parse(value)
        return value

    @property
    def when(self) -> Duration:
        """The parsed `at`."""
        return Duration.parse(self.at)


class GrowthBase(Section):
    """Settings of the run before its first growth."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate before the first growth. Default: optimizer.lr."""
    warmup_steps: int | None = Field(None, ge=0)
    """Warmup at the start. Default: lr_scheduler.warmup_steps."""


class Growth(Section):
    """Growing the model during the run."""

    enable: bool = True
    """false: train the model of [model] from scratch, the honest baseline of the same recipe."""
    base: GrowthBase = GrowthBase()
    stages: list[GrowthStage] = []
    """The growths in their order, as [[growth.stages]]."""

    @property
    def active_stages(self) -> list[GrowthStage]:
        """The stages that will happen: none when growth is switched off."""
        return list(self.stages) if self.enable else []
