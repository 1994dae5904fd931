"""The largest attention logit: q.k / sqrt(H) before the softmax, over all allowed pairs of positions.

Logits are computed once more for a few queries at a time, so there are never all (B, N, S, T) of them. To the compiler
this is one opaque operation.

Shape suffixes: B batch, S queries, T keys, N query heads, K key/value heads, G query heads per key/value head, H head
width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.tools.torch_private import all_gather_single_autograd, wait_tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits computed at a time: 64 MiB in float32."""


@torch.library.custom_op("titan_growth::largest_attention_logit", mutates_args=())
def largest_attention_logit(
    q_BSNH: Tensor, k_BTKH: Tensor, mask_B1ST: Tensor | None, q_positions_S: Tensor, k_positions_T: Tensor
) -> Tensor:
    """The largest logit, a float32 scalar, computed in float32.

    Args:
        mask_B1ST: True where attention is allowed; with None it is causal, by the positions.
    """
    num_sequences, num_queries, num_heads, head_dim = q_BSNH.shape
    num_keys, num_kv_heads = k_BTKH.shape[1:3]
    size = max(1, CHUNK_ELEMENTS // (num_sequences * num_heads * num_keys))
    largest = torch.full((), -math.inf, dtype=torch.float32, device=q_BSNH.device)
    with torch.autocast(q_BSNH.device.type, enabled=False):
        k_BKHT = k_BTKH.float().permute(0, 2, 3, 1)
        for start in range(0, num_queries, size):
            chunk = slice(start, start + size)
            q_BKGSH = q_BSNH[:, chunk].float().unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
            logits_BKGST = (q_BKGSH.flatten(2, 3) @ k_BKHT).unflatten(2, q_BKGSH.shape[2:4])
            if mask_B1ST is None:
                forbidden = q_positions_S[chunk, None] < k_positions_T[None, :]
            else:
                forbidden = ~mask_B1ST[:, :, None, chunk]
            largest = torch.maximum(largest, logits_BKGST.masked_fill_(forbidden, -math.inf).amax())
    return largest / math.sqrt(head_dim)


@largest_attention_logit.register_fake
def _(q_BSNH: Tensor, k_BTKH: Tensor, mask_B1ST: Tensor | None, q_positions_S: Tensor, k_positions_T: Tensor) -> Tensor:
    return q_BSNH.new_empty((), dtype=torch.float32)


@dataclass
class AttentionObserver:
    """Keeps the largest logit of the attention computed last, in this rank's queries and heads."""

    largest: Tensor
    """float32 scalar; overwritten, so that a recomputation of the forward pass changes nothing."""

    def __call__(self, q_BSNH: Tensor, k_BTKH: Tensor, mask_B1ST: Tensor | None) -> None:
        with torch.no_grad():
            positions_T = torch.arange(k_BTKH.shape[1], device=k_BTKH.device)
            self._observe(q_BSNH.detach(), k_BTKH.detach(), mask_B1ST, positions_T, positions_T)

    def _observe(
        self, q_BSNH: Tensor, k_BTKH: Tensor, mask_B1ST: Tensor | None, q_positions_S: Tensor, k_positions_T: Tensor
    ) -> None:
        self.largest.copy_(largest_attention_logit(q_BSNH, k_BTKH, mask_B1ST, q_positions_S, k_positions_T))


@dataclass
class RingObserver(AttentionObserver):
    """Gathers the keys first, which ring attention never has in one place."""

    q_positions_S: Tensor
    k_positions_T: Tensor
    """Of all ranks' keys, in the order of the ranks."""
    group: dist.ProcessGroup

    def __call__(self, q_BSNH: Tensor, k_BTKH: Tensor, mask_B1ST: Tensor | None) -> None:
        with torch.no_grad():
            own = k_BTKH.detach().transpose(0, 1).contiguous()
            keys = wait_tensor(all_gather_single_autograd(own, gather_dim=0, group=self.group)).transpose(0, 1)
            self._observe(q_BSNH.detach(), keys, None, self.q_positions_S, self.k_positions_T)
