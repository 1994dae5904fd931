"""z-loss: weight x log(Z)^2 in the gradient of every loss, plain, chunked, or with the vocabulary split over ranks.

See `models/z_loss.py`. The chunked loss has it for nothing. The plain one reads the logits once more, and in the
backward pass holds one more float32 copy of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from titan_growth.config.schema.recipe import TrainingConfig
from titan_growth.models.decoder import LossHead
from titan_growth.models.z_loss import ZLoss
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage


@register_stage
@dataclass
class ZLossStage(Stage):
    """Adds the gradient of the z-loss, and measures it."""

    name: ClassVar[str] = "z_loss"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "tensor_parallel", "context_parallel", "chunked_loss")

    training: TrainingConfig
    _z_loss: ZLoss = field(init=False)

    def enabled(self, context: PlanContext) -> bool:
        return self.training.z_loss_weight > 0

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        self._z_loss = ZLoss(self.training.z_loss_weight)
        for part in parts:
            if isinstance(part.output, LossHead):
                part.output.z_loss = self._z_loss
            elif part.output is not None:
                part.loss = functools.partial(part.loss, z_loss=self._z_loss)
        return parts

    def before_step(self, parts: ModelParts, context: BuildContext) -> None:
        parts[0].sums[self.name] = self._z_loss.start(parts[0].rope_cos.device)

    def step_metrics(self, parts: ModelParts, context: BuildContext) -> dict[str, Any]:
        sums = self._z_loss.sums
        assert sums is not None, "a step begins with before_step"
        if context.mesh.rank_of("tp") > 0:  # tensor-parallel ranks compute the same sums
            sums = torch.zeros_like(sums)
        if dist.get_world_size() > 1:
            dist.all_reduce(sums := sums.clone())
        squares, num_tokens = sums.tolist()
        return {"z_loss": self.training.z_loss_weight * squares / num_tokens}

    def describe(self, context: PlanContext) -> str:
        return f"z_loss: {self.training.z_loss_weight:g} x log(Z)^2"
