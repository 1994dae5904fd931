"""Forward and backward over a rank's model parts.

A token's loss is divided by the global batch's number of valid tokens *before* the backward pass. Every reduction over
ranks and microbatches is then a plain sum, and gradients, gradient norm and loss do not depend on the layout or on
gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.engine.build import BuiltModel
from titan_growth.stages.base import Microbatch
from titan_growth.tools.labels import IGNORE_INDEX


def num_valid_tokens(microbatches: Iterable[Microbatch]) -> int:
    """Valid positions in this rank's share of a batch. Counted on the host, so no device synchronisation."""
    return sum(int((microbatch["labels"] != IGNORE_INDEX).sum()) for microbatch in microbatches)


def sum_over_ranks(value: Tensor) -> Tensor:
    """All-reduces a tensor in place and returns it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


class Engine:
    """Runs an unsplit model: one part, from tokens to loss."""

    holds_last = True
    """Whether this rank computes losses."""

    def __init__(self, model: BuiltModel, device: torch.device) -> None:
        self.model = model
        self.device = device

    def forward_backward(self, microbatches: Sequence[Microbatch], num_tokens: int) -> Tensor:
        """Accumulates gradients over one global batch.

        Args:
            microbatches: this rank's share of the batch.
            num_tokens: valid tokens of the whole batch, on all ranks.

        Returns:
            The mean loss over the whole global batch, a float32 scalar, the same on every rank.
        """
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for microbatch in microbatches:
            batch = self.on_device(microbatch)
            total += self.model.train_microbatch(partial(self._train, batch, num_tokens))
        self.model.after_backward()
        return sum_over_ranks(total if self._counts else torch.zeros_like(total))

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch]) -> float:
        """Mean loss over the valid positions of all ranks' microbatches; every rank must pass the same number."""
        for part in self.model.parts:
            part.eval()
        num_tokens = 0
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for microbatch in microbatches:
            num_tokens += num_valid_tokens([microbatch])
            totals[0] += self._evaluate(self.on_device(microbatch)).double()
        totals[0] *= float(self._counts)
        totals[1] = float(num_tokens) if self.model.context.mesh.speaks_for_its_data else 0.0
        for part in self.model.parts:
            part.train()
        loss_sum, count = sum_over_ranks(totals).tolist()
        assert count > 0, "no valid position to evaluate on"
        return loss_sum / count

    @property
    def _counts(self) -> bool:
        """Whether this rank's losses go into the sum over ranks: tensor-parallel ranks compute the same ones."""
        return self.holds_last and self.model.context.mesh.rank_of("tp") == 0

    def _train(self, batch: Microbatch, num_tokens: int) -> Tensor:
        """Forward and backward; the sum of this rank's losses, each divided by num_tokens."""
        with self.model.train_context():
            loss = self._loss_sum(batch) / num_tokens
            loss.backward()
        return loss.detach()

    def _evaluate(self, batch: Microbatch) -> Tensor:
        """Forward only; the sum of this rank's losses."""
        with self.model.train_context():
            return self._loss_sum(batch)

    def _loss_sum(self, batch: Microbatch) -> Tensor:
        (part,) = self.model.parts
        return part(batch["input"], batch.get("positions"), batch["labels"]).sum()

    def on_device(self, microbatch: Microbatch) -> Microbatch:
        """This rank's share of a microbatch, on the compute device."""
        share = self.model.prepare_microbatch(microbatch)
        return {key: value.to(self.device, non_blocking=True) for key, value in share.items()}
