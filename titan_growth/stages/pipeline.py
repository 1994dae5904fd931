"""Pipeline parallelism: the layers are split over the `pp` axis, in one or more parts per rank.

This stage splits the model; `pipeline_layout.py` decides which part goes where, and `pipeline_engine.py` runs the parts
on PyTorch's schedules. Layers keep their global names.

A tied head on a different part than the embedding is a second copy of one parameter. Both copies start equal, get the
sum of both gradients here, and so stay equal.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_growth.config.schema.recipe import ParallelismConfig, TrainingConfig
from titan_growth.config.schema.techniques import ActivationCheckpointConfig, CompileConfig
from titan_growth.layout.pipeline_layout import PipelineLayout, plan_pipeline
from titan_growth.models.decoder import LossHead
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.gradients import reduced
from titan_growth.tools.shards import local_of


@register_stage
@dataclass
class Pipeline(Stage):
    """Splits the model into parts."""

    name: ClassVar[str] = "pipeline"

    parallelism: ParallelismConfig
    training: TrainingConfig
    compile: CompileConfig
    activation_checkpoint: ActivationCheckpointConfig

    def enabled(self, context: PlanContext) -> bool:
        return context.mesh_shape.pp > 1

    def check(self, context: PlanContext) -> Iterator[Problem]:
        layout = _planned(self, context, found := Findings())
        yield from found.problems
        if layout is None or not layout.conditions.splits_backward:
            return
        # These schedules run the two halves of a backward pass at different times, outside autograd's order.
        name = f"the {layout.schedule} schedule"
        if self.parallelism.fsdp_reshard_after_forward == "always":
            message = f'"always" gives wrong gradients with {name}, which splits the backward pass'
            yield Problem("parallelism.fsdp_reshard_after_forward", message, 'Use "default" or "never"')
        if self.compile.compiles_model:
            message = f"{name} splits the backward pass, which compiled layers do not allow"
            hint = "Set compile.enable = false, or use 1F1B, Interleaved1F1B, GPipe or LoopedBFS"
            yield Problem("compile.enable", message, hint)
        if self.activation_checkpoint.per_op:
            message = f"{name} splits the backward pass, in which single operations cannot be recomputed"
            hint = 'Use activation_checkpoint.mode = "full" or every k-th layer'
            yield Problem("activation_checkpoint.selective_ac_option", message, hint)

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        _planned(self, context, found := Findings())
        yield from found.warnings

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        (whole,) = parts
        split = []
        for part in layout_of(self, context).parts_of(context.mesh.rank_of("pp")):
            module = copy.deepcopy(whole)
            for layer in list(module.layers):
                if int(layer) not in part.layers:
                    del module.layers[layer]
            if not part.first:
                module.tok_embeddings = None
            if not part.last:
                module.norm = module.output = None
            split.append(module)
        return split

    def after_backward(self, parts: ModelParts, context: BuildContext) -> None:
        if context.model_config.tie_word_embeddings:
            _sum_tied_gradients(parts, layout_of(self, context), context)

    def describe(self, context: PlanContext) -> str:
        layout = layout_of(self, context)
        return (
            f"pipeline: {context.mesh_shape.pp} ranks, {len(layout.parts)} parts, {layout.schedule}, "
            f"{layout.num_microbatches} microbatches"
        )


def layout_of(stage: Pipeline, context: PlanContext) -> PipelineLayout:
    """Which part holds what, on which rank. The recipe must have passed its checks."""
    layout = _planned(stage, context, found := Findings())
    assert layout is not None, f"the pipeline was not checked: {found.problems}"
    return layout


def _planned(stage: Pipeline, context: PlanContext, found: Findings) -> PipelineLayout | None:
    num_layers, batch = context.model_config.num_layers, stage.training.local_batch_size
    return plan_pipeline(stage.parallelism, num_layers, batch, found)


def _sum_tied_gradients(parts: ModelParts, layout: PipelineLayout, context: BuildContext) -> None:
    """Gives the embedding on the first part and the head on the last the sum of both gradients."""

    def gradient_of(module: nn.Embedding | nn.Linear | LossHead) -> Tensor:
        assert module.weight.grad is not None
        module.weight.grad = gradient = reduced(module.weight.grad, module.weight)
        return local_of(gradient)

    embedding = next((gradient_of(part.tok_embeddings) for part in parts if part.tok_embeddings is not None), None)
    head = next((gradient_of(part.output) for part in parts if part.output is not None), None)
    if embedding is not None and head is not None:
        total = embedding + head
        embedding.copy_(total)
        head.copy_(total)
        return
    own = embedding if embedding is not None else head
    if own is None:
        return
    group = context.mesh.group_of("pp")
    place = layout.last_rank if embedding is not None else layout.first_rank
    peer = dist.get_global_rank(group, place)
    received = torch.empty_like(own)
    exchange = [dist.P2POp(dist.isend, own, peer, group), dist.P2POp(dist.irecv, received, peer, group)]
    if embedding is None:
        exchange.reverse()  # both sides must list the two transfers in the same order
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    own.add_(received)
