"""Forward and backward over the model parts of a rank.

The loss of a token is divided by the number of valid tokens of the whole global batch *before* the backward pass. Every
reduction over ranks and microbatches is then a plain sum, and gradients, gradient norm and loss are the same for every
layout and every way of accumulating.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan_growth.build import BuiltModel

IGNORE_INDEX = -100
"""Label of a position that is not trained on and does not count as a token."""

Microbatch = dict[str, Tensor]
"""`input` and `labels`, both (B, S) int64, and `positions` (B, S) when attention stays inside documents."""


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum over valid positions of the negative log-likelihood, in float32."""
    return F.cross_entropy(
        logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def num_valid_tokens(microbatches: Iterable[Microbatch]) -> int:
    """Valid positions in this rank's share of a batch. Counted on the host, so that no device has to be waited for."""
    return sum(int((microbatch["labels"] != IGNORE_INDEX).sum()) for microbatch in microbatches)


def sum_over_ranks(value: Tensor) -> Tensor:
    """All-reduce in place, and return it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


class Engine:
    """Runs an unsplit model: one part that goes from tokens to logits."""

    def __init__(self, model: BuiltModel, device: torch.device) -> None:
        assert len(model.parts) == 1, "a model in several parts needs the pipeline engine"
        self.model = model
        self.device = device

    def forward_backward(self, microbatches: Sequence[Microbatch], num_tokens: int) -> Tensor:
        """Accumulates the gradients of one global batch.

        Args:
            microbatches: this rank's share of the batch.
            num_tokens: valid tokens of the whole batch, over all ranks.

        Returns:
            The mean loss over the whole global batch, a float32 scalar, the same on every rank.
        """
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for microbatch in microbatches:
            with self.model.forward_context():
                loss = self._loss_sum(microbatch) / num_tokens
            loss.backward()
            total += loss.detach()
        return sum_over_ranks(total)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch]) -> float:
        """Mean loss over the valid positions of all ranks' microbatches; every rank passes equally many."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        (part,) = self.model.parts
        part.eval()
        for microbatch in microbatches:
            with self.model.forward_context():
                totals[0] += self._loss_sum(microbatch).double()
            totals[1] += (microbatch["labels"] != IGNORE_INDEX).sum()
        part.train()
        loss_sum, count = sum_over_ranks(totals).tolist()
        assert count > 0, "no valid position to evaluate on"
        return loss_sum / count

    def _loss_sum(self, microbatch: Microbatch) -> Tensor:
        (part,) = self.model.parts
        batch = {key: value.to(self.device, non_blocking=True) for key, value in microbatch.items()}
        logits_BSV = part(batch["input"], batch.get("positions"))
        return cross_entropy_sum(logits_BSV, batch["labels"])
