"""Mixed precision where FSDP does not provide it: on one rank, matrix products run in bfloat16 through autocast.

FSDP on one rank would give the same, at 20-40 % of a small step for gathers that gather nothing (design.md section 6).
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from titan_growth.config.schema import Recipe, Training
from titan_growth.stages.base import ModelParts, StageContext, StageDefaults, register_stage


@register_stage
class Autocast(StageDefaults):
    """bfloat16 computation over float32 parameters on a mesh without FSDP."""

    name: ClassVar[str] = "autocast"

    def __init__(self, training: Training) -> None:
        self.training = training

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Autocast:
        return cls(recipe.training)

    def enabled(self, context: StageContext) -> bool:
        mixed = self.training.mixed_precision_param != self.training.dtype
        return mixed and context.mesh_shape.dp_degree == 1

    def apply(self, parts: ModelParts, context: StageContext) -> ModelParts:
        return parts

    def forward_context(self, context: StageContext) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.autocast(context.device_type, dtype=getattr(torch, self.training.mixed_precision_param))

    def describe(self, context: StageContext) -> str:
        return f"autocast: matrix products in {self.training.mixed_precision_param}"
