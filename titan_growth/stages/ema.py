"""An exponential moving average of the weights, kept as shadow weights.

    mean_t = sum_i d^(t-i) w_i / sum_i d^(t-i)      over the steps i = 1 ... t
           = mean_(t-1) + (1 - d) / (1 - d^t) (w_t - mean_(t-1))

The second line is Adam's bias correction (Kingma and Ba, 2015, section 3) as a changing decay. Without it the weights
that the run began with would keep a share of d^t, for d = 0.999 more than a third at step 1,000. It depends on the step
alone, so there is nothing to store but the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from titan_growth.config.schema.averages import AveragesConfig
from titan_growth.config.schema.recipe import TrainingConfig
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.torch_private import foreach_lerp


@register_stage
@dataclass
class Ema(Stage):
    """Averages the weights over the steps."""

    name: ClassVar[str] = "ema"
    after: ClassVar[tuple[str, ...]] = ("fsdp",)  # what it averages are the shards

    averages: AveragesConfig
    training: TrainingConfig

    def enabled(self, context: PlanContext) -> bool:
        return self.averages.ema_decay > 0

    @property
    def _half_life(self) -> float:
        """Steps back to a weight that counts half as much as the last."""
        return math.log(0.5) / math.log(self.averages.ema_decay)

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        if self._half_life > self.training.steps:
            message = (
                f"{self.averages.ema_decay:g} has a half-life of {self._half_life:,.0f} steps, and the run "
                f"{self.training.steps:,}: its average counts all of them nearly alike"
            )
            yield Problem("averages.ema_decay", message, "Lower it")

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        return parts

    def update_shadow(self, shadow: Sequence[Tensor], weights: Sequence[Tensor], context: BuildContext) -> None:
        decay = self.averages.ema_decay
        share = (1 - decay) / (1 - decay**context.step)  # 1 at step 1
        if all(weight.dtype == torch.float32 for weight in weights):
            foreach_lerp(list(shadow), list(weights), share)
            return
        for mean, weight in zip(shadow, weights, strict=True):  # one at a time, for the memory of the cast
            mean.lerp_(weight.float(), share)

    def describe(self, context: PlanContext) -> str:
        decay, half_life = self.averages.ema_decay, self._half_life
        return f"ema: decay {decay:g} a step, half-life {half_life:,.1f} steps, in float32"
