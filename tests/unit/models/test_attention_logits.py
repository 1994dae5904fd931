"""The largest attention logit, against the whole (B, N, S, T) of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from titan_growth.models import attention_logits
from titan_growth.models.attention_logits import AttentionObserver, largest_attention_logit


def all_logits(q: Tensor, k: Tensor) -> Tensor:
    """(B, N, S, T)."""
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bsnh,btnh->bnst", q.float(), keys.float()) / math.sqrt(q.shape[-1])


def queries_and_keys(num_heads: int, num_kv_heads: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_heads)
    q = torch.randn(3, 10, num_heads, 8, generator=generator).to(dtype)
    return q, torch.randn(3, 10, num_kv_heads, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("chunk", [1, 3 * 4 * 10 * 3, 1 << 24], ids=["one query", "three queries", "all at once"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_chunks_find_the_largest_causal_logit(
    heads: int, kv_heads: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_logits, "CHUNK_ELEMENTS", chunk)
    q, k = queries_and_keys(heads, kv_heads)
    q[0, 0, 0] = 30 * k[0, 5, 0]  # the largest of all, and not allowed
    forbidden = ~torch.ones(10, 10).tril().bool()
    expected = all_logits(q, k).masked_fill(forbidden, -math.inf)
    positions = torch.arange(10)
    found = largest_attention_logit(q, k, None, positions, positions)
    assert found.item() == pytest.approx(expected.max().item(), rel=1e-6)
    assert all_logits(q, k).max() > expected.max(), "the mask does not matter here"


@pytest.mark.parametrize("rows", [1, 3], ids=["one mask", "a mask for each sequence"])
def test_a_mask_says_which_pairs_count(rows: int) -> None:
    q, k = queries_and_keys(4, 2)
    mask = torch.rand(rows, 1, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = all_logits(q, k).masked_fill(~mask, -math.inf).max()
    nothing = torch.empty(0)
    assert largest_attention_logit(q, k, mask, nothing, nothing).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_observer_overwrites_and_computes_in_float32_under_autocast() -> None:
    q, k = queries_and_keys(2, 2, torch.bfloat16)
    observer = AttentionObserver(torch.tensor(1e9))
    with torch.autocast("cpu", torch.bfloat16):
        observer(q.requires_grad_(), k, None)
    expected = all_logits(q, k).masked_fill(~torch.ones(10, 10).tril().bool(), -math.inf).max()
    assert observer.largest.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not observer.largest.requires_grad


def test_what_is_not_a_number_stays_one() -> None:
    q, k = queries_and_keys(2, 2)
    q[1, 7, 1, 0] = math.nan
    positions = torch.arange(10)
    assert largest_attention_logit(q, k, None, positions, positions).isnan()
