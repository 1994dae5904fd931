"""QK-clip: heads whose attention logits grow beyond a threshold have the weights of their queries and keys scaled down.

With Muon above all, products of queries and keys can grow without bound. MuonClip (Kimi K2, Moonshot AI 2025, section
2.1) looks at the largest logit m of each head in the batch of a step, and after the optimizer's step multiplies wq and
wk of the heads with m > tau by sqrt(tau / m) each: their logits shrink by tau / m, and attention stays a softmax of
plain products. Heads below tau, moments, and the forward pass are as they were.

**Grouped queries.** A key head serves several query heads, each with its own factor g = min(1, tau / m). The key head
takes the root of the smallest g of its group, and each query head what is left: g / root. So every head's logits are
scaled by exactly its own g, those of heads below tau stay the same function, and the head that exceeds tau most shares
its factor evenly between wq and wk, as without groups. The price is that queries of the others in its group grow by at
most as much as the keys shrink. Scaling queries alone would have no such side effect, but would let keys grow forever.

**QK-norm** makes logits independent of the size of wq and wk, and bounds them by the gains of its norms, which all
heads of a layer share: clipping one head would shrink all others. There QK-clip is refused.

Every rank has the maxima of its tensor-parallel heads after one reduction over the ranks with other tokens, so it can
scale whatever rows of wq and wk it holds, also where shards cut through a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.config.schema.recipe import TrainingConfig
from titan_growth.layout.mesh import Mesh
from titan_growth.models.initialize import local_and_offset
from titan_growth.stages.attention_observer import observe_attention
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage, never_due
from titan_growth.stages.order import register_stage
from titan_growth.tools.collectives import reduce_maxima
from titan_growth.tools.errors import Problem


class Factors(NamedTuple):
    """Factors on the weights of a layer's heads."""

    queries_N: Tensor
    keys_K: Tensor

    @classmethod
    def of(cls, largest_N: Tensor, threshold: float, num_kv_heads: int) -> Factors:
        """From the largest logit of each query head; ones where it is not above the threshold, or not finite."""
        exceeds = (largest_N > threshold) & largest_N.isfinite()
        wanted_KG = torch.where(exceeds, threshold / largest_N, 1.0).view(num_kv_heads, -1)
        keys_K = wanted_KG.amin(dim=1).sqrt()
        return cls((wanted_KG / keys_K.unsqueeze(1)).flatten(), keys_K)


@register_stage
@dataclass
class QKClip(Stage):
    """Scales wq and wk of the heads whose largest logit is above a threshold."""

    name: ClassVar[str] = "qk_clip"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "tensor_parallel", "context_parallel")

    optimizer: OptimizerConfig
    training: TrainingConfig
    _is_due: bool = field(init=False, default=False)
    _largest: Tensor = field(init=False)
    """(layers, heads of this rank), float32: the largest logits of the step; -inf in layers of other pipeline ranks."""
    _clipped_at: int | None = field(init=False, default=None)
    """The step that `_largest` is complete for."""

    def enabled(self, context: PlanContext) -> bool:
        return self.optimizer.qk_clip > 0 and context.model_config.num_layers > 0

    def check(self, context: PlanContext) -> Iterator[Problem]:
        if context.model_config.qk_norm:
            message = "scales wq and wk, on whose size attention does not depend in a model with QK-norm"
            yield Problem("optimizer.qk_clip", message, "Set it to 0: the norms bound the logits")

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        interval, steps = self.optimizer.qk_clip_interval, self.training.steps
        yield from never_due("optimizer.qk_clip_interval", interval, steps, "clipped")

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        self._is_due, self._clipped_at = False, None
        for part in parts:
            observe_attention(part, self._observes, self._take)
        return parts

    def _observes(self) -> bool:
        return self._is_due

    def _take(self, layer: int, largest_N: Tensor) -> None:
        torch.maximum(self._largest[layer], largest_N, out=self._largest[layer])

    def before_step(self, parts: ModelParts, context: BuildContext) -> None:
        self._is_due = context.step % self.optimizer.qk_clip_interval == 0
        if self._is_due:
            config = context.model_config
            size = (config.num_layers, config.num_heads // context.mesh_shape.tp)
            self._largest = torch.full(size, -math.inf, device=parts[0].rope_cos.device)

    @torch.no_grad()
    def after_optimizer_step(self, parts: ModelParts, context: BuildContext) -> None:
        if not self._is_due:
            return
        self._is_due, self._clipped_at = False, context.step
        _reduce(self._largest, context.mesh)
        num_kv_heads = context.model_config.num_kv_heads // context.mesh_shape.tp
        for part in parts:
            for layer, block in part.layers.items():
                attention: Any = block.attention
                factors = Factors.of(self._largest[int(layer)], self.optimizer.qk_clip, num_kv_heads)
                _scale_heads(attention.wq.weight, factors.queries_N, context)
                _scale_heads(attention.wk.weight, factors.keys_K, context)

    def weights_replaced(self, parts: ModelParts, context: BuildContext) -> None:
        self._is_due = False  # the steps of a learned growth are not announced, and not clipped

    def step_metrics(self, parts: ModelParts, context: BuildContext) -> dict[str, Any]:
        if self._clipped_at != context.step:
            return {}
        largest = self._largest.max()
        num_clipped = (self._largest > self.optimizer.qk_clip).sum()
        if any(context.mesh.rank_of(axis) for axis in ("dp_replicate", "dp_shard", "cp")):
            num_clipped.zero_()  # these ranks have the same heads
        if dist.get_world_size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(num_clipped)
        return {"qk_max_logit": largest.item(), "qk_clipped_heads": int(num_clipped.item())}

    def describe(self, context: PlanContext) -> str:
        interval = self.optimizer.qk_clip_interval
        when = "each step" if interval == 1 else f"every {interval} steps"
        return f"qk_clip: after {when}, heads with logits above {self.optimizer.qk_clip:g}"


def _reduce(largest: Tensor, mesh: Mesh) -> None:
    """The maxima over all ranks that hold the same heads and see other tokens, in place; NaN counts as infinite."""
    for axis in ("dp_replicate", "dp_shard", "cp"):
        reduce_maxima(largest, mesh.group_of(axis))


def _scale_heads(weight: Tensor, factors: Tensor, context: BuildContext) -> None:
    """Scales this rank's rows of a projection, each by the factor of its head.

    Args:
        factors: of the heads on this tensor-parallel rank.
    """
    local, offset = local_and_offset(weight)
    rows = factors.repeat_interleave(context.model_config.head_dim)
    start = offset[0] - context.mesh.rank_of("tp") * rows.shape[0] if local.shape[0] else 0
    local.mul_(rows[start : start + local.shape[0]].unsqueeze(1).to(local.device))
