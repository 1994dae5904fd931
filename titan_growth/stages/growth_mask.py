"""The mask of G_random: what a growth added is multiplied by c, which rises from 0 to 1 over the first steps.

    x' = [x, x_new * c]      new channels of the residual stream, where written           (Du et al., Eq. 33)
    y  = W [h, h_new * c]    new heads and SwiGLU channels, where read
    Y  = X + F(X) * c        F the attention or SwiGLU of a new layer                     (Du et al., Eq. 34-36)

New heads are masked where they are read, not at their queries: attention with zero queries averages the values. All
three multiply a module's input or output by a vector. Which modules and channels follows from the growth map and the
family's roles, so the stage knows no model. The vector is a buffer that is neither stored nor trained; c depends only
on the step, so a resumed run has the right one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from titan_growth.growth.axes import NEW
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.models.roles import RESIDUAL, Role, layer_of, role_of
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage

INPUT, OUTPUT = "growth_mask_of_input", "growth_mask_of_output"
"""Buffers of a masked module."""


@register_stage
class GrowthMask(Stage):
    """Multiplies what the last growth added by a mask that opens."""

    name: ClassVar[str] = "growth_mask"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "float8", "tensor_parallel", "context_parallel", "chunked_loss")

    def enabled(self, context: PlanContext) -> bool:
        return context.transition is not None and context.transition.growth.masked

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        assert context.transition is not None
        tp_rank = context.mesh.rank_of("tp") if context.mesh_shape.tp > 1 else 0
        for part in parts:
            for module, buffer, pattern in masked_modules(part, context.transition.growth, context.family.ROLES):
                module.register_buffer(buffer, torch.empty(len(pattern)), persistent=False)
                # Kept beside the buffer, which holds no data on the meta device.
                setattr(module, f"{buffer}_pattern", pattern)
                mask = _Mask(tp_rank)
                if buffer == INPUT:
                    # Before tensor parallelism's hook, which turns the input into a DTensor.
                    module.register_forward_pre_hook(mask.on_input, prepend=True)
                else:
                    module.register_forward_hook(mask.on_output)
        return parts

    def before_step(self, parts: ModelParts, context: BuildContext) -> None:
        assert context.transition is not None
        opening = context.transition.opening(context.step)
        for part in parts:
            for module in part.modules():
                for buffer in (INPUT, OUTPUT):
                    if (pattern := getattr(module, f"{buffer}_pattern", None)) is not None:
                        mask = torch.where(pattern, opening, 1.0)
                        setattr(module, buffer, mask.to(device=part.rope_cos.device, dtype=torch.float32))

    def describe(self, context: PlanContext) -> str:
        assert context.transition is not None
        return f"growth_mask: what the last growth added opens over {context.transition.mask_steps} steps"


def masked_modules(
    part: nn.Module, growth: GrowthMap, roles: dict[str, Role]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, its mask's buffer, which channels are masked) for every masked module of a part."""
    for name, _ in part.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue
        role, layer = role_of(roles, name), layer_of(name)
        module = part.get_submodule(path)
        if layer is not None and growth.layers[layer] is None:
            if role.writes_residual:
                yield module, OUTPUT, torch.ones(growth.after.dim, dtype=torch.bool)
            continue
        written = role.dims[-1] if role.reads is None and not role.is_norm else RESIDUAL if role.writes_residual else ""
        if written == RESIDUAL and (pattern := _new(growth, RESIDUAL)) is not None:
            yield module, OUTPUT, pattern
        read = "" if role.reads is None else role.dims[role.reads]
        if read != RESIDUAL and (pattern := _new(growth, read)) is not None:
            yield module, INPUT, pattern


def _new(growth: GrowthMap, name: str) -> Tensor | None:
    """Which positions of an axis are new; None if none are."""
    axis = growth.axes.get(name)
    return None if axis is None or NEW not in axis.source else torch.tensor([at == NEW for at in axis.source])


class _Mask:
    """Forward hooks that multiply a tensor by this rank's share of the module's mask."""

    def __init__(self, tp_rank: int) -> None:
        self.tp_rank = tp_rank

    def on_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._times(output, getattr(module, OUTPUT))

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._times(args[0], getattr(module, INPUT)), *args[1:])

    def _times(self, values: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(values.dtype)
        if isinstance(values, DTensor):
            replicated = [Replicate()] * values.device_mesh.ndim
            return values * DTensor.from_local(mask, values.device_mesh, replicated, run_check=False)
        width = values.shape[-1]
        if width != mask.shape[0]:  # split between tensor-parallel ranks
            mask = mask[self.tp_rank * width : (self.tp_rank + 1) * width]
        return values * mask
