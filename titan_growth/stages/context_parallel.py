"""Context parallelism: each sequence is sharded over the `cp` axis; only attention communicates.

Every rank loads the whole sequence and keeps its own positions. `headtail` cuts it into 2n pieces and gives rank r the
r-th from the front and the r-th from the back, which balances the work under a causal mask. Two kinds of attention:

    ring    PyTorch's ring attention (`context_parallel`): flash attention while keys and values rotate. CUDA only.
    gather  all ranks' keys and values are gathered and masked. Exact on every device; used on CPUs, whose attention
            kernels ring attention cannot call, and with document masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.config.schema.recipe import DataConfig, ParallelismConfig, ValidationConfig
from titan_growth.models.decoder import SequenceContext, SequenceLayout, documents_of
from titan_growth.stages.base import BuildContext, Microbatch, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.stages.tensor_parallel import sequence_problems
from titan_growth.tools.errors import Problem
from titan_growth.tools.torch_private import all_gather_single_autograd, ring_attention, wait_tensor


def positions_by_rank(num_tokens: int, degree: int, balancer: str) -> Tensor:
    """The positions each rank holds of a sequence, in its order; shape (degree, num_tokens / degree)."""
    if balancer == "none":
        return torch.arange(num_tokens).view(degree, -1)
    pieces = torch.arange(num_tokens).view(2 * degree, -1)
    return torch.cat((pieces[:degree], pieces.flip(0)[:degree]), dim=1)


@dataclass(frozen=True)
class GatheredContext(SequenceContext):
    """Attention of this rank's queries over the keys and values of all ranks."""

    group: dist.ProcessGroup

    def attend(self, q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> Tensor:
        both = torch.cat((k_BSKH, v_BSKH), dim=2).transpose(0, 1).contiguous()  # gathered along the first dimension
        gathered = wait_tensor(all_gather_single_autograd(both, gather_dim=0, group=self.group))
        k_BTKH, v_BTKH = gathered.transpose(0, 1).chunk(2, dim=2)
        return super().attend(q_BSNH, k_BTKH, v_BTKH)


class RingPositions(NamedTuple):
    """Which positions attend to which."""

    queries_S: Tensor
    """Of this rank."""
    keys_T: Tensor
    """Of all ranks, in their order."""


@dataclass(kw_only=True)
class ShardedSequence(SequenceLayout):
    """The positions of one context-parallel rank."""

    rank: int
    degree: int
    balancer: str
    group: dist.ProcessGroup
    ring: bool
    hidden_shards: int
    _placed: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def context(self, cos: Tensor, sin: Tensor, num_tokens: int, positions_BT: Tensor | None) -> SequenceContext:
        total = num_tokens * self.degree
        assert total <= cos.shape[0], f"sequence of {total} tokens in a model built for {cos.shape[0]}"
        own_S, gathered_T, causal_ST = self._tables(total, cos.device)
        if positions_BT is None:
            if self.ring:
                return SequenceContext(cos[own_S], sin[own_S], None)  # `context_parallel` replaces its attention
            return GatheredContext(cos[own_S], sin[own_S], causal_ST[None, None], self.group)
        document_BT = documents_of(positions_BT)
        same_document = document_BT[:, own_S].unsqueeze(2) == document_BT[:, gathered_T].unsqueeze(1)
        mask = (same_document & causal_ST).unsqueeze(1)
        own_BS = positions_BT[:, own_S]
        return GatheredContext(cos[own_BS], sin[own_BS], mask, self.group)

    def ring_positions(self, num_tokens: int, device: torch.device) -> RingPositions | None:
        """What ring attention does not say itself; None where keys are gathered."""
        return RingPositions(*self._tables(num_tokens * self.degree, device)[:2]) if self.ring else None

    def _tables(self, total: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Own positions, all positions in gathered order, and the causal mask; cached on the device."""
        if (total, device) not in self._placed:
            by_rank = positions_by_rank(total, self.degree, self.balancer)
            own_S, gathered_T = by_rank[self.rank].to(device), by_rank.flatten().to(device)
            causal = own_S[:, None] >= gathered_T[None, :] if not self.ring else torch.ones(0, 0, dtype=torch.bool)
            self._placed[total, device] = own_S, gathered_T, causal
        return self._placed[total, device]


@register_stage
@dataclass
class ContextParallel(Stage):
    """Sequences sharded over ranks."""

    name: ClassVar[str] = "context_parallel"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "tensor_parallel")  # the latter sets `hidden_shards`

    parallelism: ParallelismConfig
    validation: ValidationConfig
    data: DataConfig

    def enabled(self, context: PlanContext) -> bool:
        return context.mesh_shape.cp > 1

    def _rings(self, context: PlanContext) -> bool:
        return context.device_type == "cuda" and not self.data.document_mask

    def check(self, context: PlanContext) -> Iterator[Problem]:
        yield from sequence_problems(context, self.validation)

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        if self.parallelism.context_parallel_rotate_method != "allgather" and not self._rings(context):
            reason = "with data.document_mask" if self.data.document_mask else "on a CPU"
            message = f"has no effect: {reason} keys and values are gathered, not rotated"
            yield Problem("parallelism.context_parallel_rotate_method", message)

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        for part in parts:
            part.sequence = ShardedSequence(
                rank=context.mesh.rank_of("cp"),
                degree=context.mesh_shape.cp,
                balancer=self.parallelism.context_parallel_load_balancer,
                group=context.mesh.group_of("cp"),
                ring=self._rings(context),
                hidden_shards=part.sequence.hidden_shards,
            )
        return parts

    def prepare_microbatch(self, microbatch: Microbatch, context: BuildContext) -> Microbatch:
        by_rank = positions_by_rank(
            microbatch["input"].shape[1], context.mesh_shape.cp, self.parallelism.context_parallel_load_balancer
        )
        own_S = by_rank[context.mesh.rank_of("cp")]
        return microbatch | {key: microbatch[key][:, own_S].contiguous() for key in ("input", "labels")}

    def train_context(self, context: BuildContext) -> contextlib.AbstractContextManager[Any]:
        if not self._rings(context):
            return contextlib.nullcontext()
        return ring_attention(
            context.mesh.device_mesh["cp"],
            rotate_method=self.parallelism.context_parallel_rotate_method,
            balanced=self.parallelism.context_parallel_load_balancer == "headtail",
            device_type=context.device_type,
        )

    def describe(self, context: PlanContext) -> str:
        if self._rings(context):
            how = f"ring attention ({self.parallelism.context_parallel_rotate_method})"
        else:
            how = "keys and values gathered"
        balancer = self.parallelism.context_parallel_load_balancer
        return f"context_parallel: {context.mesh_shape.cp} ranks, {how}, load balancer: {balancer}"
