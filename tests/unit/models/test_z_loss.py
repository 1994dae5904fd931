"""z-loss and softcap against their formulas, in the plain and the chunked loss, and with a split vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.harness import run_ranks
from tests.unit.models.plain_loss import Operations, grads_of, inputs, relative
from tests.unit.models.test_llama import CONFIG
from tests.unit.models.test_sharded_loss import shard_of
from titan_growth.models.chunked_loss import chunked_cross_entropy_sum
from titan_growth.models.decoder import Decoder, cross_entropy_sum
from titan_growth.models.llama import Decoder as Llama
from titan_growth.models.z_loss import ZLoss
from titan_growth.tools.labels import IGNORE_INDEX

CPU = torch.device("cpu")
WEIGHT = 0.05
CAPS = [None, 3.0]


def by_formula(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and z-loss without its weight."""
    logits = F.linear(hidden, weight)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    valid = labels != IGNORE_INDEX
    log_z = logits[valid].exp().sum(dim=1).log()
    return (log_z - logits[valid].gather(1, labels[valid].unsqueeze(1)).squeeze(1)).sum(), log_z.square().sum()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None, z_loss: ZLoss | None) -> Tensor:
    logits = F.linear(hidden, weight)
    return cross_entropy_sum(logits.unsqueeze(0), labels.unsqueeze(0), softcap=cap, z_loss=z_loss).squeeze(0)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None, z_loss: ZLoss | None) -> Tensor:
    return chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=5, softcap=cap, z_loss=z_loss)


@pytest.mark.parametrize("loss_of", [plain, chunked])
@pytest.mark.parametrize("cap", CAPS)
def test_the_value_is_the_cross_entropy_and_the_gradient_that_of_both(loss_of: Any, cap: float | None) -> None:
    hidden, weight, labels = inputs()
    z_loss = ZLoss(WEIGHT)
    z_loss.start(CPU)
    loss = loss_of(hidden, weight, labels, cap, z_loss)
    assert torch.equal(loss, loss_of(hidden, weight, labels, cap, None))
    nll, squares = by_formula(hidden, weight, labels, cap)
    assert loss.item() == pytest.approx(nll.item(), rel=1e-6)
    for found, expected in zip(
        grads_of(loss, hidden, weight), grads_of(nll + WEIGHT * squares, hidden, weight), strict=True
    ):
        assert relative(found, expected) < 1e-5
    assert z_loss.sums is not None
    assert z_loss.sums.tolist() == pytest.approx([squares.item(), (labels != IGNORE_INDEX).sum().item()], rel=1e-6)


@pytest.mark.parametrize("loss_of", [plain, chunked])
def test_no_gradient_no_z_loss(loss_of: Any) -> None:
    hidden, weight, labels = inputs()
    z_loss = ZLoss(WEIGHT)
    z_loss.start(CPU)
    with torch.no_grad():
        loss_of(hidden, weight, labels, None, z_loss)
    assert z_loss.sums is not None
    assert z_loss.sums.tolist() == [0.0, 0.0]


def test_the_chunked_loss_needs_no_more_products() -> None:
    hidden, weight, labels = inputs()
    with Operations() as without:
        chunked(hidden, weight, labels, None, None)
    with Operations() as operations:
        chunked(hidden, weight, labels, 3.0, ZLoss(WEIGHT))
    assert operations.num_products == without.num_products
    assert operations.largest == without.largest


def test_logits_of_a_model_are_capped() -> None:
    from dataclasses import replace

    torch.manual_seed(0)
    model: Decoder = Llama(replace(CONFIG, logit_softcap=0.5), 8)
    model.materialized(CPU)
    tokens = torch.arange(8).unsqueeze(0)
    logits = model(tokens)
    model.config = CONFIG
    assert torch.equal(logits, 0.5 * torch.tanh(model(tokens) / 0.5))
    assert logits.abs().max() < 0.5


def split(rank: int, vocab: int, cap: float | None) -> dict[str, Any]:
    hidden, weight, labels = inputs(vocab)
    rows = shard_of(rank, dist.get_world_size(), vocab)
    shard = weight.detach()[rows].requires_grad_()
    z_loss = ZLoss(WEIGHT)
    z_loss.start(CPU)
    loss = chunked_cross_entropy_sum(
        hidden,
        shard,
        labels,
        chunk_tokens=5,
        group=dist.group.WORLD,
        vocab_offset=rows.start,
        softcap=cap,
        z_loss=z_loss,
    )
    hidden_grad, weight_grad = grads_of(loss, hidden, shard)
    assert z_loss.sums is not None
    sums = z_loss.sums.tolist()
    return {"loss": loss.item(), "hidden": hidden_grad.tolist(), "weight": weight_grad.tolist(), "sums": sums}


@pytest.mark.parametrize(("num_ranks", "vocab"), [(2, 37), (3, 4)])
@pytest.mark.parametrize("cap", CAPS)
def test_a_split_vocabulary_in_chunks(num_ranks: int, vocab: int, cap: float | None) -> None:
    """Also one that leaves a rank without rows."""
    hidden, weight, labels = inputs(vocab)
    nll, squares = by_formula(hidden, weight, labels, cap)
    hidden_grad, weight_grad = grads_of(nll + WEIGHT * squares, hidden, weight)
    results = run_ranks(split, num_ranks, vocab, cap)
    assert len({str(result["sums"]) for result in results}) == 1
    assert results[0]["loss"] == pytest.approx(nll.item(), rel=1e-6)
    assert results[0]["sums"][0] == pytest.approx(squares.item(), rel=1e-6)
    assert relative(torch.tensor([result["hidden"] for result in results]).sum(dim=0), hidden_grad) < 1e-5
    for rank, result in enumerate(results):
        if (expected := weight_grad[shard_of(rank, num_ranks, vocab)]).numel():
            assert relative(torch.tensor(result["weight"]), expected) < 1e-5
