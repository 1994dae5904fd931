"""Mixed precision without FSDP: on one rank, autocast runs matrix products in bfloat16.

FSDP on one rank would cost 20-40 % of a small step for no-op gathers. On several ranks, and under Float8, FSDP does it:
it casts each parameter once, all alike. The two round differently: autocast leaves the residual stream in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_growth.config.schema.recipe import ModelConfig, TrainingConfig
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage


@register_stage
@dataclass
class Autocast(Stage):
    """bfloat16 computation over float32 parameters on a mesh without FSDP."""

    name: ClassVar[str] = "autocast"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "compile")

    training: TrainingConfig
    model: ModelConfig

    def enabled(self, context: PlanContext) -> bool:
        if self.training.enable_cpu_offload and context.device_type != "cpu":
            return False  # offload needs FSDP
        return self.training.mixes_precision and context.mesh_shape.num_ranks == 1 and not self.model.uses_float8

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        for part in parts:
            autocast = torch.autocast(context.device_type, dtype=getattr(torch, self.training.mixed_precision_param))
            part.forward = autocast(part.forward)  # type: ignore[method-assign]
        return parts

    def describe(self, context: PlanContext) -> str:
        return f"autocast: matrix products in {self.training.mixed_precision_param}"
