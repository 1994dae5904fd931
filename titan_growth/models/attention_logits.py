"""The largest attention logit of each head: q.k / sqrt(H) before the softmax, over all allowed pairs of positions.

Attention kernels do not give their logits away, so products of queries and keys are made once more, a few queries at a
time: there are never all (B, N, S, T) of them, and no gradient. Keys that no query of a piece may attend to are left
out where that is known beforehand, which halves the work of plain causal attention. To the compiler this is one opaque
operation.

Shape suffixes: B batch, S queries (of this rank), T keys, N query heads, K key/value heads, G query heads per key/value
head, H head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.tools.torch_private import all_gather_single_autograd, wait_tensor

MAX_ELEMENTS = 1 << 24
"""Logits that exist at once: 64 MiB in float32."""


def max_logits(
    q_BSNH: Tensor,
    k_BTKH: Tensor,
    mask_B1ST: Tensor | None = None,
    positions_S: Tensor | None = None,
    positions_T: Tensor | None = None,
    *,
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """The largest logit of each query head, computed in float32; shape (N,).

    Which pairs count: those of the mask; or else keys that are not behind the query, by the positions given; or else
    plain causal attention, S = T. A head without any pair has -inf. NaN and infinities are passed on.

    Args:
        mask_B1ST: True where attention is allowed, (B or 1, 1, S, T).
        positions_S, positions_T: of queries and keys in the sequence, where a rank holds a part of it.
    """
    (batch, num_queries, num_heads, width), (num_keys, num_kv_heads) = q_BSNH.shape, k_BTKH.shape[1:3]
    places = torch.arange(num_keys, device=q_BSNH.device)
    is_causal = mask_B1ST is None and positions_S is None
    q_places, k_places = (places if one is None else one for one in (positions_S, positions_T))
    found_N = torch.full((num_heads,), -torch.inf, dtype=torch.float32, device=q_BSNH.device)
    k_BKHT = k_BTKH.permute(0, 2, 3, 1)
    size = max(1, max_elements // max(1, batch * num_heads * num_keys))
    for start in range(0, num_queries, size):
        end = min(start + size, num_queries)
        seen = end if is_causal else num_keys
        q_BKGSH = q_BSNH[:, start:end].unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        products = _products(q_BKGSH.flatten(2, 3).flatten(0, 1), k_BKHT[..., :seen].flatten(0, 1))
        logits_BKGST = products.unflatten(0, (batch, num_kv_heads)).unflatten(2, q_BKGSH.shape[2:4])
        if mask_B1ST is None:
            forbidden = q_places[start:end, None] < k_places[None, :seen]
        else:
            forbidden = ~mask_B1ST[:, :, None, start:end]
        found_N = torch.maximum(found_N, logits_BKGST.masked_fill_(forbidden, -torch.inf).amax((0, 3, 4)).flatten())
    return found_N / math.sqrt(width)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Batched matrix products in float32; from 16-bit operands, whose products that is exact for, on tensor cores."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(q, k, out_dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return q.float() @ k.float()


@torch.library.custom_op("titan_growth::max_attention_logits", mutates_args=())
def _max_logits(
    q: Tensor, k: Tensor, mask: Tensor | None, positions_S: Tensor | None, positions_T: Tensor | None
) -> Tensor:
    return max_logits(q, k, mask, positions_S, positions_T)


@_max_logits.register_fake
def _(q: Tensor, k: Tensor, mask: Tensor | None, positions_S: Tensor | None, positions_T: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[2], dtype=torch.float32)


@dataclass
class AttentionObserver:
    """Keeps the largest logits of the attention computed last, in this rank's queries and heads."""

    largest_N: Tensor
    """float32; overwritten, so that a recomputation of the forward pass changes nothing."""

    @torch.no_grad()
    def __call__(self, q_BSNH: Tensor, k_BTKH: Tensor, mask_B1ST: Tensor | None) -> None:
        self.largest_N.copy_(_max_logits(q_BSNH.detach(), k_BTKH.detach(), mask_B1ST, None, None))


@dataclass
class RingObserver(AttentionObserver):
    """Gathers the keys first, which ring attention never has in one place."""

    positions_S: Tensor
    positions_T: Tensor
    """Of all ranks' keys, in the order of the ranks."""
    group: dist.ProcessGroup

    @torch.no_grad()
    def __call__(self, q_BSNH: Tensor, k_BTKH: Tensor, mask_B1ST: Tensor | None) -> None:
        own = k_BTKH.detach().transpose(0, 1).contiguous()
        k_BTKH = wait_tensor(all_gather_single_autograd(own, gather_dim=0, group=self.group)).transpose(0, 1)
        self.largest_N.copy_(_max_logits(q_BSNH.detach(), k_BTKH, None, self.positions_S, self.positions_T))
