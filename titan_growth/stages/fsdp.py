"""FSDP2 and HSDP: parameters, gradients and moments sharded over `dp_shard`, replicated over `dp_replicate`.

With a shard degree of 1 the same call gives plain data parallelism. Context-parallel ranks hold the same weights and
see different tokens, so they form one axis with `dp_shard`.

The loss is divided by the *global* batch's number of valid tokens before the backward pass, so gradients are summed
over ranks, never averaged: the divide factor is 1. gloo has no pre-multiplied sum, so a plain one is forced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_growth.config.schema.recipe import ModelConfig, ParallelismConfig, TrainingConfig
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem


@register_stage
@dataclass
class FSDP(Stage):
    """Fully sharded data parallelism, over the units that the model family declares."""

    name: ClassVar[str] = "fsdp"
    after: ClassVar[tuple[str, ...]] = (
        "pipeline",
        "float8",
        "tensor_parallel",
        "context_parallel",
        "chunked_loss",
        "activation_checkpoint",
        "compile",
        "autocast",
        "sdc_check",
    )

    parallelism: ParallelismConfig
    training: TrainingConfig
    model: ModelConfig

    def enabled(self, context: PlanContext) -> bool:
        shape = context.mesh_shape
        if shape.dp_degree * shape.cp > 1 or self.model.uses_float8:
            return True
        return self._offloads(context) or (self.training.mixes_precision and shape.num_ranks > 1)

    def _offloads(self, context: PlanContext) -> bool:
        return self.training.enable_cpu_offload and context.device_type != "cpu"

    def parameter_device(self, context: BuildContext) -> str | None:
        return "cpu" if self._offloads(context) else None

    def _reshards(self, shape: MeshShape) -> bool:
        """Whether the gathered parameters are freed after the forward pass."""
        policy = self.parallelism.fsdp_reshard_after_forward
        return policy == "always" or (policy == "default" and shape.pp == 1)

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        if self.training.enable_cpu_offload and context.device_type == "cpu":
            yield Problem("training.enable_cpu_offload", "has no effect: on a CPU everything is in host memory")

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        shared: dict[str, Any] = {
            "mesh": context.mesh.fsdp_mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=getattr(torch, self.training.mixed_precision_param),
                reduce_dtype=getattr(torch, self.training.mixed_precision_reduce),
            ),
        }
        if self._offloads(context):
            shared["offload_policy"] = CPUOffloadPolicy()
        always = self.parallelism.fsdp_reshard_after_forward == "always"
        reshard = self._reshards(context.mesh_shape)
        for part in parts:
            units = context.family.fsdp_units(part)
            for position, unit in enumerate(units):
                # The backward pass needs the last unit at once, so resharding it would only repeat the gather.
                is_last = position == len(units) - 1
                modules = unit if len(unit) > 1 else unit[0]
                fully_shard(modules, reshard_after_forward=reshard and (always or not is_last), **shared)
            fully_shard(part, reshard_after_forward=reshard, **shared)
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    if context.device_type == "cpu":
                        module.set_force_sum_reduction_for_comms(True)
        return parts

    def weights_replaced(self, parts: ModelParts, context: BuildContext) -> None:
        """Frees what an evaluation has gathered: without a backward pass, the last unit is kept for the next."""
        for part in parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def describe(self, context: PlanContext) -> str:
        shape = context.mesh_shape
        kind = "FSDP2" if shape.dp_replicate == 1 else "DDP" if shape.fsdp_degree == 1 else "HSDP"
        policy = self.parallelism.fsdp_reshard_after_forward
        offload = ", parameters and moments in host memory" if self._offloads(context) else ""
        return (
            f"fsdp: {kind}, {shape.dp_replicate} x {shape.fsdp_degree} ranks, compute in "
            f"{self.training.mixed_precision_param}, reshard after forward: {policy}{offload}"
        )
