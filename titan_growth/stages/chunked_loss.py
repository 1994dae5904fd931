"""Chunked loss: head and cross-entropy on a few positions at a time, so the full logits never exist.

With a vocabulary of 128k, the float32 logits of one 8k-token sequence take 4 GiB, more than a layer's activations.
Under tensor parallelism each rank handles its shard of the vocabulary, for the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from titan_growth.config.schema.recipe import TrainingConfig
from titan_growth.models.chunked_loss import chunked_cross_entropy_sum
from titan_growth.models.decoder import LossHead
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage


class ChunkedLossHead(LossHead):
    """A linear head that computes the loss chunk by chunk, or plain logits without labels.

    Args:
        weight: a parameter (V, D), a DTensor split over the vocabulary under tensor parallelism.
        group: the tensor-parallel ranks.
        softcap: of the logits that the loss is computed from.
    """

    def __init__(
        self, weight: Tensor, chunk_tokens: int, group: dist.ProcessGroup | None, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.weight = weight
        self.chunk_tokens = chunk_tokens
        self.group = group

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        weight_VD: Tensor = self.weight
        offset = 0
        if isinstance(x_BSD, DTensor):
            if labels_BS is None:
                logits = F.linear(x_BSD.redistribute(placements=[Replicate()]), weight_VD)
                return logits.full_tensor() if isinstance(logits, DTensor) else logits
            # Each rank's gradient of the hidden state covers its vocabulary shard only: a partial sum.
            x_BSD = x_BSD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        elif labels_BS is None:
            return F.linear(x_BSD, weight_VD)
        if isinstance(weight_VD, DTensor):
            size, rank = weight_VD.shape[0], weight_VD.device_mesh.get_local_rank()
            offset = min(size, rank * -(-size // weight_VD.device_mesh.size()))
            weight_VD = weight_VD.to_local()
        loss = chunked_cross_entropy_sum(
            x_BSD.flatten(0, 1),
            weight_VD,
            labels_BS.flatten(),
            chunk_tokens=self.chunk_tokens,
            group=self.group,
            vocab_offset=offset,
            softcap=self.softcap,
            z_loss=self.z_loss,
        )
        return torch.stack([loss])


@register_stage
@dataclass
class ChunkedLoss(Stage):
    """Head and loss in chunks."""

    name: ClassVar[str] = "chunked_loss"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "float8", "tensor_parallel", "context_parallel")

    training: TrainingConfig

    def enabled(self, context: PlanContext) -> bool:
        return self.training.loss_chunk_tokens > 0

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        group = context.mesh.group_of("tp") if context.mesh_shape.tp > 1 else None
        for part in parts:
            if part.output is not None:
                part.output = ChunkedLossHead(
                    part.output.weight, self.training.loss_chunk_tokens, group, part.config.logit_softcap
                )
        return parts

    def describe(self, context: PlanContext) -> str:
        return f"chunked_loss: {self.training.loss_chunk_tokens} positions at a time"
