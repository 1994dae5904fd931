"""The largest attention logits of each layer's heads, for the stages that want to see them.

All of them share one observer, so logits are computed once. It only *overwrites* what it found last: recomputation runs
what is inside a block a second time, and compiled code contains it. A hook of the block, outside of both, hands the
numbers over right after each forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from titan_growth.models.attention_logits import AttentionObserver, RingObserver
from titan_growth.models.decoder import Decoder, SequenceContext, SequenceLayout
from titan_growth.stages.context_parallel import ShardedSequence

Take = Callable[[int, Tensor], None]
"""Gets a layer's number and the largest logit of each of this rank's heads in one pass, (N,) float32, to be copied."""


def observe_attention(part: Decoder, is_due: Callable[[], bool], take: Take) -> None:
    """Has a part's layers observed in training passes, where they are due. Compiled code depends on `is_due`."""
    if not isinstance(part.sequence, ObservedSequence):
        part.sequence = ObservedSequence(part.sequence, part.config.num_heads)
    part.sequence.wanted.append(is_due)
    for layer, block in part.layers.items():
        block.register_forward_hook(_Taken(int(layer), part.sequence, is_due, take))


class ObservedSequence(SequenceLayout):
    """Another layout whose attention is observed, where it is due."""

    def __init__(self, inner: SequenceLayout, num_heads: int) -> None:
        self.inner = inner
        self.num_heads = num_heads
        self.hidden_shards = inner.hidden_shards
        self.wanted: list[Callable[[], bool]] = []
        self.last_N: Tensor | None = None
        """The largest logits of the attention computed last."""

    def context(self, cos: Tensor, sin: Tensor, num_tokens: int, positions_BT: Tensor | None) -> SequenceContext:
        context = self.inner.context(cos, sin, num_tokens, positions_BT)
        if not (torch.is_grad_enabled() and any(is_due() for is_due in self.wanted)):
            return context
        if self.last_N is None:
            # Hidden states are split over as many ranks as the heads are.
            num_heads = self.num_heads // self.hidden_shards
            self.last_N = torch.full((num_heads,), -torch.inf, dtype=torch.float32, device=cos.device)
        observer = AttentionObserver(self.last_N)
        if isinstance(self.inner, ShardedSequence) and (ring := self.inner.ring_positions(num_tokens, cos.device)):
            observer = RingObserver(self.last_N, ring.queries_S, ring.keys_T, self.inner.group)
        return replace(context, observer=observer)


@dataclass
class _Taken:
    """Hook of a block, to hand over what its attention has left."""

    layer: int
    sequence: ObservedSequence
    is_due: Callable[[], bool]
    take: Take

    def __call__(self, _block: nn.Module, _inputs: Any, _output: Tensor) -> None:
        if torch.is_grad_enabled() and self.sequence.last_N is not None and self.is_due():
            self.take(self.layer, self.sequence.last_N)
