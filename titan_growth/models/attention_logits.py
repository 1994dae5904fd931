"""The largest attention logit of each head: what QK-clip acts on, and what shows that attention drifts.

Attention kernels do not give their logits away, so the products of queries and keys are made once more, a few queries
at a time: never a whole (B, N, S, T), and no gradient. Keys that no query of a piece may attend to are left out where
that is known beforehand, which halves the work of plain causal attention.

Shape suffixes: B batch, S queries (of this rank), T keys, C queries of one piece, N query heads, K key/value heads,
G query heads of a key/value head, H head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_ELEMENTS = 2**24
"""Logits that exist at once: 64 MiB in float32."""


@torch.no_grad()
def max_logits(
    q_BSNH: Tensor,
    k_BTKH: Tensor,
    *,
    mask_B1ST: Tensor | None = None,
    positions_S: Tensor | None = None,
    positions_T: Tensor | None = None,
    scale: float | None = None,
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """The largest q.k * scale of each query head over the pairs that attention allows; float32, shape (N,).

    Which pairs: those of the mask; or else keys that are not behind the query, by the positions given; or else plain
    causal attention, S = T. A head without any pair has -inf. NaN and infinities are passed on.

    Args:
        mask_B1ST: true where attention is allowed, (B or 1, 1, S, T).
        positions_S, positions_T: of queries and keys in the sequence, where a rank holds a part of it.
        scale: default 1 / sqrt(H), as in PyTorch's attention.
    """
    (batch, num_queries, num_heads, width), (num_keys, num_kv_heads) = q_BSNH.shape, k_BTKH.shape[1:3]
    is_causal = mask_B1ST is None and positions_S is None
    assert not is_causal or num_queries == num_keys, "causal attention over other keys than the queries' own"
    keys_BKHT = k_BTKH.permute(0, 2, 3, 1)
    found_N = torch.full((num_heads,), -torch.inf, dtype=torch.float32, device=q_BSNH.device)
    step = max(1, max_elements // max(1, batch * num_heads * num_keys))
    for start in range(0, num_queries, step):
        end = min(start + step, num_queries)
        seen = end if is_causal else num_keys
        q_BCKGH = q_BSNH[:, start:end].unflatten(2, (num_kv_heads, -1))
        logits_BKGCT = (q_BCKGH.permute(0, 2, 3, 1, 4).flatten(2, 3) @ keys_BKHT[..., :seen]).unflatten(
            2, (-1, end - start)
        )
        if mask_B1ST is not None:
            allowed = mask_B1ST[:, :, start:end].unsqueeze(2)
        elif positions_S is not None and positions_T is not None:
            allowed = positions_S[start:end, None] >= positions_T[None, :]
        else:
            places = torch.arange(seen, device=q_BSNH.device)
            allowed = places[start:end, None] >= places[None, :]
        largest = logits_BKGCT.masked_fill(~allowed, -torch.inf).amax(dim=(0, 3, 4)).flatten()
        found_N = torch.maximum(found_N, largest.float())
    return found_N * (1.0 / math.sqrt(width) if scale is None else scale)


def note_max_logits(
    maxima_N: Tensor,
    q_BSNH: Tensor,
    k_BTKH: Tensor,
    *,
    mask_B1ST: Tensor | None = None,
    positions_S: Tensor | None = None,
    positions_T: Tensor | None = None,
) -> None:
    """Raises `maxima_N` to what `max_logits` finds; the compiler sees one operation, not the loop over pieces.

    Doing it twice changes nothing, as when a layer is recomputed in the backward pass.
    """
    _raise_maxima(maxima_N, q_BSNH.detach(), k_BTKH.detach(), mask_B1ST, positions_S, positions_T)


@torch.library.custom_op(
    "titan_growth::raise_maxima",
    mutates_args=("maxima_N",),
    schema="(Tensor(a!) maxima_N, Tensor q, Tensor k, Tensor? mask, Tensor? positions_S, Tensor? positions_T) -> ()",
)
def _raise_maxima(
    maxima_N: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    positions_S: Tensor | None,
    positions_T: Tensor | None,
) -> None:
    found_N = max_logits(q, k, mask_B1ST=mask, positions_S=positions_S, positions_T=positions_T)
    maxima_N.copy_(torch.maximum(maxima_N, found_N))


@_raise_maxima.register_fake
def _(*_arguments: object) -> None:
    """Makes nothing."""
