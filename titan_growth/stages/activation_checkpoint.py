"""Activation checkpointing: layers drop activations and recompute them in the backward pass.

    full           every layer keeps only its input
    selective, k   every k-th layer does
    selective, op  every layer keeps the results of expensive operations and recomputes cheap ones
    memory_budget  the compiler decides what to keep, within a fraction of all activations; nothing to do here

A layer's `forward` is replaced with a `Checkpointed` one. PyTorch's wrapper module would change the parameters' names,
which checkpoints and growth rely on. Layers are chosen by global id, so a layer is treated alike on every pipeline
split and after growth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_growth.config.schema.techniques import ActivationCheckpointConfig, CompileConfig
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.torch_private import expensive_operations


class Checkpointed:
    """A function whose intermediate results are recomputed in the backward pass."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function = function
        self.options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.function, *args, use_reentrant=False, **self.options, **kwargs)


@register_stage
@dataclass
class ActivationCheckpoint(Stage):
    """Recomputes layers, or their cheap operations."""

    name: ClassVar[str] = "activation_checkpoint"
    after: ClassVar[tuple[str, ...]] = (
        "pipeline",
        "float8",
        "tensor_parallel",
        "context_parallel",
        "chunked_loss",
        "growth_mask",
    )

    activation_checkpoint: ActivationCheckpointConfig
    compile: CompileConfig

    def enabled(self, context: PlanContext) -> bool:
        return self.activation_checkpoint.mode != "none"

    @property
    def every(self) -> int:
        """k if every k-th layer is recomputed; 1 for all."""
        section = self.activation_checkpoint
        return int(section.selective_ac_option) if section.mode == "selective" and not section.per_op else 1

    def check(self, context: PlanContext) -> Iterator[Problem]:
        if self.activation_checkpoint.per_op and self.compile.compiles_model and context.mesh_shape.tp > 1:
            message = '"op" does not work inside compiled layers under tensor parallelism'
            hint = 'Use activation_checkpoint.mode = "full", every k-th layer, or no compile'
            yield Problem("activation_checkpoint.selective_ac_option", message, hint)

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        num_layers = context.model_config.num_layers
        if self.every > num_layers > 0:
            message = f"{self.every} recomputes nothing in a model of {num_layers} layers"
            yield Problem("activation_checkpoint.selective_ac_option", message)

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        section = self.activation_checkpoint
        if section.mode == "memory_budget":
            return parts  # the compile stage sets it
        options = section.model_dump(include={"preserve_rng_state", "determinism_check", "debug", "early_stop"})
        for part in parts:
            if section.per_op:
                options["context_fn"] = partial(_per_operation, self._recomputed_shapes(part))
            for layer, block in part.layers.items():
                if (int(layer) + 1) % self.every == 0:
                    block.forward = Checkpointed(block.forward, **options)
        return parts

    def _recomputed_shapes(self, part: nn.Module) -> frozenset[tuple[int, ...]]:
        """Shapes (in, out) of the weights whose products are recomputed, as the matrix product sees them."""
        patterns = self.activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns
        return frozenset(
            (module.in_features, module.out_features)
            for name, module in part.named_modules()
            if isinstance(module, nn.Linear) and any(pattern in name for pattern in patterns)
        )

    def describe(self, context: PlanContext) -> str:
        section = self.activation_checkpoint
        if section.mode == "memory_budget":
            return f"activation_checkpoint: memory budget {section.memory_budget:g}, chosen by the compiler"
        if section.per_op:
            return "activation_checkpoint: cheap operations are recomputed"
        which = f"one layer in {self.every}" if self.every > 1 else "every layer"
        return f"activation_checkpoint: {which} is recomputed"


def _per_operation(recomputed_shapes: frozenset[tuple[int, ...]]) -> Any:
    """The two dispatch modes of selective checkpointing, made anew for each forward pass.

    A function, not an object: the compiler accepts nothing else.
    """
    saved, products = expensive_operations(), {torch.ops.aten.mm.default, torch.ops.aten.linear.default}
    # Every other product is kept: keeping all would need nearly as much memory as no checkpointing.
    num_products = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if operation in products:
            if tuple(args[1].shape) in recomputed_shapes:
                return CheckpointPolicy.PREFER_RECOMPUTE
            num_products[context.is_recompute] += 1
            keep = num_products[context.is_recompute] % 2 == 1
        else:
            keep = operation in saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
