"""The chunked cross-entropy with a vocabulary that is split over ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tests.harness import run_ranks
from tests.unit.models.plain_loss import Operations, grads_of, inputs, plain, relative
from titan_growth.models.chunked_loss import chunked_cross_entropy_sum


def shard_of(rank: int, num_ranks: int, vocab: int) -> slice:
    """DTensor's uneven sharding: the last shards are shorter, or empty."""
    size = -(-vocab // num_ranks)
    return slice(min(rank * size, vocab), min((rank + 1) * size, vocab))


def sharded_loss(rank: int, vocab: int, dtype: torch.dtype, scale: float, bad_label: int | None) -> dict[str, Any]:
    hidden, weight, labels = inputs(vocab, dtype, scale)
    if bad_label is not None:
        labels[1] = bad_label
    rows = shard_of(rank, dist.get_world_size(), vocab)
    shard = weight.detach()[rows].requires_grad_()
    options: dict[str, Any] = {"chunk_tokens": 5, "group": dist.group.WORLD, "vocab_offset": rows.start}
    loss = chunked_cross_entropy_sum(hidden, shard, labels, **options)
    with torch.no_grad():
        again = chunked_cross_entropy_sum(hidden, shard, labels, **options)
    assert again.item() == loss.item()
    hidden_grad, weight_grad = grads_of(loss, hidden, shard)
    # Lists: the harness pickles what ranks return.
    return {"loss": loss.item(), "hidden": hidden_grad.double().tolist(), "weight": weight_grad.double().tolist()}


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(("num_ranks", "vocab"), [(2, 131), (3, 131), (3, 5), (3, 4)])
def test_sharded_vocabulary(num_ranks: int, vocab: int, scale: float) -> None:
    hidden, weight, labels = inputs(vocab, scale=scale)
    reference = plain(hidden, weight, labels)
    hidden_grad, weight_grad = (grad.double() for grad in grads_of(reference, hidden, weight))
    results = run_ranks(sharded_loss, num_ranks, vocab, torch.float32, scale, None)
    assert len({result["loss"] for result in results}) == 1, "ranks disagree"
    assert results[0]["loss"] == pytest.approx(reference.item(), rel=1e-6)
    shares = torch.tensor([result["hidden"] for result in results], dtype=torch.float64)
    assert relative(shares.sum(dim=0), hidden_grad) < 1e-6
    assert relative(shares[0], hidden_grad) > 1e-2, "the gradient of the hidden states is a rank's share, not the sum"
    for rank, result in enumerate(results):
        expected = weight_grad[shard_of(rank, num_ranks, vocab)]
        shard_grad = torch.tensor(result["weight"], dtype=torch.float64).reshape(expected.shape)
        difference = (shard_grad - expected).abs()
        assert not (difference > 1e-6 * weight_grad.abs().max()).any()  # holds for an empty shard too


def test_empty_shard_in_bfloat16() -> None:
    hidden, weight, labels = inputs(4, torch.bfloat16)
    reference = plain(hidden, weight, labels)
    hidden_grad = grads_of(reference, hidden)[0].double()
    results = run_ranks(sharded_loss, 3, 4, torch.bfloat16, 1.0, None)
    assert results[0]["loss"] == pytest.approx(reference.item(), rel=1e-6)
    shares = torch.tensor([result["hidden"] for result in results], dtype=torch.float64)
    assert relative(shares.sum(dim=0), hidden_grad) < 0.02
    assert not shares[2].any()
    assert results[2]["weight"] == []


def test_a_label_on_no_rank_is_not_passed_over() -> None:
    for result in run_ranks(sharded_loss, 2, 131, torch.float32, 1.0, 131):
        assert result["loss"] == math.inf
        assert torch.tensor(result["hidden"])[1].isnan().all()
        assert torch.tensor(result["weight"]).isnan().all()


def sequence_shard_grad(rank: int) -> list[list[float]]:
    """As sequence parallelism calls it: DTensor gathers the hidden states and reduce-scatters the shares."""
    hidden, weight, labels = inputs(131)
    mesh = init_device_mesh("cpu", (2,))
    rows = shard_of(rank, 2, 131)
    own = hidden.detach()[:12].chunk(2)[rank].requires_grad_()
    gathered = DTensor.from_local(own, mesh, [Shard(0)]).redistribute(placements=[Replicate()])
    loss = chunked_cross_entropy_sum(
        gathered.to_local(grad_placements=[Partial()]),
        weight[rows],
        labels[:12],
        chunk_tokens=5,
        group=mesh.get_group(),
        vocab_offset=rows.start,
    )
    loss.backward()
    return own.grad.tolist()


def test_shares_are_a_partial_gradient_for_dtensor() -> None:
    hidden, weight, labels = inputs(131)
    plain(hidden[:12], weight, labels[:12]).backward()
    shards = run_ranks(sequence_shard_grad, 2)
    assert relative(torch.tensor(shards).flatten(0, 1), hidden.grad[:12]) < 1e-6


def collectives(rank: int) -> int:
    hidden, weight, labels = inputs(131)
    rows = shard_of(rank, 2, 131)
    with Operations() as operations:
        loss = chunked_cross_entropy_sum(
            hidden, weight[rows], labels, chunk_tokens=5, group=dist.group.WORLD, vocab_offset=rows.start
        )
        loss.backward()
    return sum(name.lstrip("_").startswith(("all", "reduce")) for name in operations.names)


def test_one_collective_per_chunk() -> None:
    assert run_ranks(collectives, 2) == [3, 3]
