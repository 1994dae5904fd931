"""What the layers do, on the steps that were asked for; nothing is computed on the others.

    gradient_norm        before clipping                       weight_norm         before the step
    update_ratio         |step| / |weights before it|          activation_rms, activation_max
    attention_logit_max  largest q.k / sqrt(H) before the softmax

Every number is of the global batch and of whole parameters. Each rank counts what no other one counts: its shards where
a parameter is sharded, the first replica where it is copied, its positions of its sequences. Sums and maxima over all
ranks follow, two collectives in all.

The forward pass is measured by hooks (`layer_hooks.py`). Weights are copied on the steps that are measured, one copy of
this rank's shards, to know the update whatever the optimizer is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_growth.config.schema.recipe import MetricsConfig, TrainingConfig
from titan_growth.layout.mesh import Mesh
from titan_growth.models.layer_groups import ByGroup, LayerGroups
from titan_growth.stages.attention_observer import observe_attention
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage, never_due
from titan_growth.stages.layer_hooks import ForwardMeter, hook_activations
from titan_growth.stages.order import register_stage
from titan_growth.tools.collectives import reduce_maxima
from titan_growth.tools.errors import Problem
from titan_growth.tools.gradients import reduced
from titan_growth.tools.shards import local_of
from titan_growth.tools.torch_private import foreach_norm


@register_stage
@dataclass
class LayerMetrics(Stage):
    """Measures by layer and by group of parameters."""

    name: ClassVar[str] = "layer_metrics"
    after: ClassVar[tuple[str, ...]] = (
        "pipeline",
        "float8",
        "tensor_parallel",
        "context_parallel",
        "chunked_loss",
        "growth_mask",
    )

    metrics: MetricsConfig
    training: TrainingConfig
    _meter: ForwardMeter = field(init=False)
    _squares: Tensor = field(init=False)
    """(3, slots), float64: this rank's share of the squared norms of gradients, weights and updates."""
    _before: dict[str, Tensor] = field(init=False)
    """This rank's weights before the optimizer's step."""

    def enabled(self, context: PlanContext) -> bool:
        return self.metrics.layers_freq > 0 or self.metrics.attention_freq > 0

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        for key in ("layers_freq", "attention_freq"):
            yield from never_due(f"metrics.{key}", getattr(self.metrics, key), self.training.steps, "measured")

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        groups = LayerGroups.of(context.family.ROLES, context.model_config.num_layers)
        self._meter, self._before = ForwardMeter(groups), {}
        for part in parts:
            if self.metrics.layers_freq:
                hook_activations(part, self._meter, context.family.ROLES)
            if self.metrics.attention_freq:
                observe_attention(part, self._observes, self._meter.add_logits)
        return parts

    def _observes(self) -> bool:
        """Whether attention logits are measured now."""
        return self._meter.attention

    def before_step(self, parts: ModelParts, context: BuildContext) -> None:
        due, device = _due(self.metrics, context.step), parts[0].rope_cos.device
        self._meter.start(device, layers=due.layers, attention=due.attention)
        self._before = {}
        if due.layers:
            parts[0].sums[self.name] = self._meter.sums
            self._squares = torch.zeros(3, self._meter.groups.num_slots, dtype=torch.float64, device=device)

    def after_backward(self, parts: ModelParts, context: BuildContext) -> None:
        if self._meter.layers:
            gradients: dict[str, Tensor] = {}
            for name, parameter in _parameters(parts, context).items():
                if parameter.grad is not None:
                    parameter.grad = reduced(parameter.grad, parameter)  # collective, so for all of them
                if _counts(parameter, context.mesh):
                    self._before[name] = local_of(parameter).detach().clone()
                    if parameter.grad is not None:
                        gradients[name] = local_of(parameter.grad).detach()
            self._square(0, gradients, context)
            self._square(1, self._before, context)
        self._meter.stop()  # evaluations are not measured

    def after_optimizer_step(self, parts: ModelParts, context: BuildContext) -> None:
        if self._before:
            parameters = _parameters(parts, context)
            for name, before in self._before.items():
                before.sub_(local_of(parameters[name]).detach())
            self._square(2, self._before, context)
            self._before = {}

    def _square(self, row: int, shards: dict[str, Tensor], context: BuildContext) -> None:
        """Adds the squared norms of shards to the slots of their parameters."""
        if shards:
            squares = torch.stack(foreach_norm(list(shards.values()), dtype=torch.float64)).square()
            slots = torch.tensor([self._meter.groups.slot_of(context.family.ROLES, name) for name in shards])
            device = self._squares.device  # parameters may be in host memory
            self._squares[row].index_add_(0, slots.to(device), squares.to(device))

    def weights_replaced(self, parts: ModelParts, context: BuildContext) -> None:
        self._meter.stop()  # the steps of a learned growth are not announced, and not measured
        self._before = {}

    def layer_metrics(self, parts: ModelParts, context: BuildContext) -> dict[str, ByGroup]:
        self._before = {}  # those of a step that was skipped
        due, meter = _due(self.metrics, context.step), self._meter
        found: dict[str, ByGroup] = {}
        if due.layers:
            sums = torch.cat((self._squares, meter.sums.T))
            largest = meter.largest.clone()
            _reduce(sums, largest)
            found = _tables(meter.groups, sums, largest, has_head=not context.model_config.tied)
        if due.attention:
            logits = meter.logits.clone()
            _reduce(None, logits)
            found["attention_logit_max"] = {"attention": logits.tolist()}
        return found

    def describe(self, context: PlanContext) -> str:
        what = {"what layers do": self.metrics.layers_freq, "attention logits": self.metrics.attention_freq}
        return f"layer_metrics: {', '.join(f'{name} every {freq} steps' for name, freq in what.items() if freq)}"


class _Due(NamedTuple):
    """What is measured in a step."""

    layers: bool
    attention: bool


def _due(section: MetricsConfig, step: int) -> _Due:
    return _Due(*(freq > 0 and step % freq == 0 for freq in (section.layers_freq, section.attention_freq)))


def _parameters(parts: ModelParts, context: BuildContext) -> dict[str, nn.Parameter]:
    """This rank's parameters by name; a tied copy is its original."""
    named = (pair for part in parts for pair in part.named_parameters())
    return {name: parameter for name, parameter in named if name not in context.model_config.tied}


def _counts(parameter: Tensor, mesh: Mesh) -> bool:
    """Whether this rank counts its shard of a parameter: of replicas, the first one counts."""
    copied_over = {axis for axis in ("dp_replicate", "dp_shard", "cp", "tp") if getattr(mesh.shape, axis) > 1}
    if isinstance(parameter, DTensor):
        own = parameter.device_mesh
        names = own.mesh_dim_names or ()
        copied_over -= {*names, *(("dp_shard", "cp") if "fsdp" in names else ())}
        for axis, placement in enumerate(parameter.placements):
            if placement.is_replicate() and own.get_local_rank(axis) > 0:
                return False
    return all(mesh.rank_of(axis) == 0 for axis in copied_over)


def _reduce(sums: Tensor | None, maxima: Tensor) -> None:
    """Over all ranks, in place."""
    reduce_maxima(maxima)
    if sums is not None and dist.get_world_size() > 1:
        dist.all_reduce(sums)


def _tables(groups: LayerGroups, sums: Tensor, largest: Tensor, *, has_head: bool) -> dict[str, ByGroup]:
    """The metrics from sums over all ranks.

    Args:
        sums: (5, slots): squared norms of gradients, weights and updates; squares and number of activations.
        largest: (slots,), of activations.
    """
    squares = sums[:3, : groups.num_slots - len(groups.around)].view(3, groups.num_layers, len(groups.in_layer))
    squares[..., -1] = squares[..., :-1].sum(-1)  # a whole layer
    gradients, weights, updates, activations, counts = sums
    rows = torch.stack(
        (gradients.sqrt(), weights.sqrt(), (updates / weights).sqrt(), (activations / counts).sqrt(), largest)
    )
    names = ("gradient_norm", "weight_norm", "update_ratio", "activation_rms", "activation_max")
    found = {name: groups.by_group(row) for name, row in zip(names, rows.tolist(), strict=True)}
    for name, by_group in found.items():
        if not has_head or name.startswith("activation"):  # a chunked loss never holds the logits
            del by_group["head"]
    return found
