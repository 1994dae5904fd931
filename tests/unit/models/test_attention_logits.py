"""The largest logit of each head, against all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titan_growth.models.attention_logits import AttentionObserver, max_logits

B, S, N, K, H = 2, 12, 4, 2, 8


@pytest.fixture
def queries_keys() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, heads, H, generator=generator) for heads in (N, K)]


def by_hand(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """Every logit, and the largest allowed one of each head."""
    logits = torch.einsum("bsnh,btnh->bnst", q, k.repeat_interleave(N // K, dim=2)) / H**0.5
    return logits.masked_fill(~allowed, -torch.inf).amax(dim=(0, 2, 3))


CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()


@pytest.mark.parametrize("max_elements", [1, B * N * S * 5, 10**9])
def test_causal(queries_keys: list[Tensor], max_elements: int) -> None:
    """In pieces of 1, 5 and all queries."""
    q, k = queries_keys
    q[0, 3, 1] = 9 * k[0, 7, 0]  # larger than all others, and not allowed
    found = max_logits(q, k, max_elements=max_elements)
    torch.testing.assert_close(found, by_hand(q, k, CAUSAL), rtol=1e-6, atol=0)
    assert found[1] < by_hand(q, k, torch.ones_like(CAUSAL))[1]


@pytest.mark.parametrize("max_elements", [1, B * N * S * 5])
def test_masked(queries_keys: list[Tensor], max_elements: int) -> None:
    """Two documents in the first row, one in the second."""
    q, k = queries_keys
    document = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    mask = (CAUSAL & (document.unsqueeze(1) == document.unsqueeze(2))).unsqueeze(1)
    found = max_logits(q, k, mask, max_elements=max_elements)
    torch.testing.assert_close(found, by_hand(q, k, mask), rtol=1e-6, atol=0)


def test_ranks_with_parts_of_the_sequence(queries_keys: list[Tensor]) -> None:
    """Each has some queries and all keys, in another order; the larger of the two is that of the whole."""
    q, k = queries_keys
    order = torch.tensor([0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8])
    found = [max_logits(q[:, own], k[:, order], None, own, order, max_elements=1) for own in order.split(S // 2)]
    torch.testing.assert_close(torch.maximum(*found), by_hand(q, k, CAUSAL), rtol=1e-6, atol=0)


def test_nan_and_no_pair(queries_keys: list[Tensor]) -> None:
    q, k = queries_keys
    nothing = torch.zeros(1, 1, S, S, dtype=torch.bool)
    assert max_logits(q, k, nothing).tolist() == [-torch.inf] * N
    q[1, 2, 3, 4] = torch.nan
    assert max_logits(q, k).isnan().tolist() == [False, False, False, True]


def test_sixteen_bits_are_not_rounded_to(queries_keys: list[Tensor]) -> None:
    """Logits are float32 sums of the products, also under autocast."""
    q, k = (each.bfloat16() for each in queries_keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = max_logits(q, k)
    torch.testing.assert_close(found, by_hand(q.float(), k.float(), CAUSAL), rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_observer_keeps_what_it_saw_last(queries_keys: list[Tensor], compiled: bool) -> None:
    """In compiled code too, without a graph break, and without a share in the gradient."""
    q, k = (each.requires_grad_() for each in queries_keys)
    observer = AttentionObserver(torch.full((N,), 99.0))

    def attention(q: Tensor, k: Tensor) -> Tensor:
        observer(q, k, None)
        return (q * 2).sum() + (k * 3).sum()

    function = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
    function(q, k).backward()
    torch.testing.assert_close(observer.largest_N, by_hand(q, k, CAUSAL).detach(), rtol=1e-6, atol=0)
    assert q.grad is not None
    assert (q.grad == 2).all()
