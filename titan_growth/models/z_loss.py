"""The z-loss: weight x log(Z)^2 of each position, Z the sum over the vocabulary of exp(logit).

Cross-entropy does not change when all logits of a position move together, so nothing keeps them from drifting to where
bfloat16 is coarse. The z-loss holds log Z near 0 (PaLM, Chowdhery et al. 2022, section 5, with a weight of 1e-4). Its
gradient is 2 x weight x log(Z) x softmax(logits).

It is added to the loss that is differentiated, and divided with it by the number of valid tokens of the global batch;
the *value* of the loss stays the cross-entropy, which runs and validations are compared by. The z-loss is a metric of
its own, and is not computed where no gradient is.

Shape suffixes: N positions, V vocabulary (of this rank), R ranks that the vocabulary is split over, K statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from titan_growth.tools.labels import IGNORE_INDEX


class ZLoss:
    """Adds the gradient of a z-loss to losses, and remembers how large it was.

    `sums` has two numbers on the device: the sum of log(Z)^2 and the number of valid positions since `start`.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.sums: Tensor | None = None

    def start(self, device: torch.device) -> Tensor:
        """Counts from 0; before the first call nothing is counted. Returns the sums."""
        if self.sums is None:
            self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        return self.sums.zero_()

    def attached(self, loss: Tensor, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        """The loss, of the same value, whose gradient is that of the sum of both losses.

        Args:
            logits_NV: in float32; a DTensor whose vocabulary is split over ranks, or all of them.
            labels_N: positions with the label -100 have no z-loss.
        """
        log_z_N = log_partition(logits_NV).where(labels_N != IGNORE_INDEX, 0.0)
        total = log_z_N.square().sum()
        self.count(total.detach(), labels_N)
        return loss + self.weight * (total - total.detach())

    def count(self, total: Tensor, labels_N: Tensor) -> None:
        """Remembers the sum of log(Z)^2 over these positions."""
        if self.sums is not None:
            self.sums += torch.stack((total.to(self.sums.dtype), (labels_N != IGNORE_INDEX).sum()))


def log_partition(logits_NV: Tensor) -> Tensor:
    """log Z of each position, a plain tensor (N,), the same on every rank that the vocabulary is split over."""
    if not isinstance(logits_NV, DTensor):
        return logits_NV.logsumexp(dim=-1)
    result: Tensor = _SplitLogPartition.apply(logits_NV.to_local(), logits_NV.device_mesh.get_group())
    return result


class _SplitLogPartition(torch.autograd.Function):
    """log Z over a split vocabulary. The gradient of each rank's logits needs only log Z: no collective."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, group: dist.ProcessGroup) -> Tensor:
        stats_2N = logits_NV.new_full((2, logits_NV.shape[0]), -torch.inf)
        if logits_NV.shape[1] > 0:
            torch.amax(logits_NV, dim=1, out=stats_2N[0])
        torch.sum((logits_NV - stats_2N[0].unsqueeze(1)).exp_(), dim=1, out=stats_2N[1])
        max_RN, sum_RN = gathered(stats_2N, group).unbind(1)
        max_N = max_RN.amax(dim=0)
        log_z_N = max_N + (sum_RN * (max_RN - max_N).exp()).sum(dim=0).log()
        ctx.save_for_backward(logits_NV, log_z_N)
        return log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, log_z_N = ctx.saved_tensors
        return (logits_NV - log_z_N.unsqueeze(1)).exp_().mul_(grad_N.unsqueeze(1)), None


def gathered(stats_KN: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The statistics of all ranks, shape (R, K, N)."""
    if group is None:
        return stats_KN.unsqueeze(0)
    stats_RKN = stats_KN.new_empty(group.size(), *stats_KN.shape)
    dist.all_gather_single(stats_RKN.flatten(0, 1), stats_KN, group=group)  # gloo wants the ranks concatenated
    return stats_RKN
