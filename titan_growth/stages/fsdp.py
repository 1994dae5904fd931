"""FSDP2 and HSDP: parameters, gradients and moments sharded over `dp_shard`, replicated over `dp_replicate`.

With a shard degree of 1 the same call gives plain data parallelism: the sharded axis has one rank.

The loss is divided by the number of valid tokens of the *global* batch before the backward pass, so gradients must be
summed over ranks, never averaged: the divide factor is 1. gloo has no pre-multiplied sum, hence the forced plain one.
"""

from __future__ import annotations

from typing import ClassVar

from titan_growth.config.schema import Parallelism, Recipe, Training
from titan_growth.stages.base import ModelParts, StageContext, StageDefaults, register_stage


@register_stage
class FSDP(StageDefaults):
    """Fully sharded data parallelism, per unit that the model family declares."""

    name: ClassVar[str] = "fsdp"
    after: ClassVar[tuple[str, ...]] = (
        "pipeline",
        "float8",
        "tensor_parallel",
        "context_parallel",
        "activation_checkpoint",
        "compile",
        "autocast",
    )

    def __init__(self, parallelism: Parallelism, training: Training) -> None:
        self.parallelism = parallelism
        self.training = training

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> FSDP:
        return cls(recipe.parallelism, recipe.training)

    def enabled(self, context: StageContext) -> bool:
        return context.mesh_shape.dp_degree > 1

    def apply(self, parts: ModelParts, context: StageContext) -> ModelParts:
        import torch
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        assert context.mesh is not None, "FSDP needs process groups"
        axes = ("dp_replicate", "dp_shard") if context.mesh_shape.dp_replicate > 1 else ("dp_shard",)
        mesh = context.mesh.device_mesh[axes]
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, self.training.mixed_precision_param),
            reduce_dtype=getattr(torch, self.training.mixed_precision_reduce),
        )
        always = self.parallelism.fsdp_reshard_after_forward == "always"
        reshard = always or (self.parallelism.fsdp_reshard_after_forward == "default" and context.mesh_shape.pp == 1)
        for part in parts:
            units = context.family.fsdp_units(part)
            for position, unit in enumerate(units):
                # The last unit's gather would be repeated at once by the backward pass.
                is_last = position == len(units) - 1
                modules = unit if len(unit) > 1 else unit[0]
                fully_shard(
                    modules, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard and (always or not is_last)
                )
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    if context.device_type == "cpu":
                        module.set_force_sum_reduction_for_comms(True)
        return parts

    def describe(self, context: StageContext) -> str:
        shape = context.mesh_shape
        kind = "FSDP2" if shape.dp_replicate == 1 else "DDP" if shape.dp_shard == 1 else "HSDP"
        policy = self.parallelism.fsdp_reshard_after_forward
        return (
            f"fsdp: {kind}, {shape.dp_replicate} x {shape.dp_shard} ranks, compute in "
            f"{self.training.mixed_precision_param}, reshard after forward: {policy}"
        )
