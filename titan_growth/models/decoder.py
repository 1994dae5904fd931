"""The frame that all decoder families share: embedding, a dictionary of blocks, norm, head, loss.

A family (a file such as `llama.py`) supplies the block; everything around it, and everything stages use, is here, so no
stage knows which family it works on. Layers live in a `ModuleDict` keyed by the *global* layer id: `layers.7` has that
name on every pipeline rank and in every layout, which growth and resharding rely on.

What parallelism changes are objects that a stage can replace, not branches in the math:

    part.sequence   which positions this rank holds, and what its queries attend to  (context parallelism)
    part.output     the head; a `LossHead` computes the loss without full logits     (chunked loss)
    part.loss       from logits to the sum of losses                                 (compile)

Shape suffixes: B batch, S sequence (of this rank), T sequence (of all context-parallel ranks), D model width,
V vocabulary, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_growth.models.config import DecoderConfig
from titan_growth.models.parametrization import output_scale
from titan_growth.models.roles import Role
from titan_growth.models.z_loss import ZLoss
from titan_growth.tools.labels import IGNORE_INDEX
from titan_growth.tools.shards import local_of

ROLES = {
    "tok_embeddings.weight": Role(("vocab", "dim")),
    "norm.weight": Role(("dim",)),
    "output.weight": Role(("vocab", "dim"), reads=1),
}
"""Roles of the frame's parameters; a family adds those of its block."""


class Split(Enum):
    """How tensor parallelism splits a module. Between modules the residual stream is sharded over the sequence."""

    VOCABULARY = "rows of the embedding are split; the result is split over the sequence"
    SEQUENCE = "computed on this rank's piece of the sequence (norms of the residual stream)"
    HEADS = "computed on this rank's heads (norms of queries and keys)"
    GATHER_INPUT = "its input is gathered from the pieces of the sequence"
    COLUMNS = "output channels are split"
    ROWS = "input channels are split; results are summed, and split over the sequence"
    HEAD = "the output head: its vocabulary is split"


@dataclass(frozen=True)
class SequenceContext:
    """What attention needs to know about positions; shared by all layers of a forward pass."""

    cos: Tensor
    """(S, H/2), or (B, S, H/2) if each row has its own positions."""
    sin: Tensor
    mask_B1ST: Tensor | None
    """True where attention is allowed, shape (B or 1, 1, S, T); None = plain causal."""
    observer: Callable[[Tensor, Tensor, Tensor | None], None] | None = field(default=None, kw_only=True)
    """Shown queries, keys and mask."""

    def attend(self, q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> Tensor:
        """Causal grouped-query attention; (B, S, N * H)."""
        if self.observer is not None:
            self.observer(q_BSNH, k_BSKH, self.mask_B1ST)
        num_groups = q_BSNH.shape[2] // k_BSKH.shape[2]
        if num_groups > 1:
            k_BSKH = k_BSKH.repeat_interleave(num_groups, dim=2)
            v_BSKH = v_BSKH.repeat_interleave(num_groups, dim=2)
        out_BNSH = F.scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            k_BSKH.transpose(1, 2),
            v_BSKH.transpose(1, 2),
            attn_mask=self.mask_B1ST,
            is_causal=self.mask_B1ST is None,
        )
        return out_BNSH.transpose(1, 2).flatten(-2)


def rope_frequencies(config: DecoderConfig, device: torch.device | None = None) -> Tensor:
    """Angular frequencies of the channel pairs, shape (H/2,), float32, with Llama 3.1 scaling.

    Wavelengths shorter than original / high_freq_factor are kept, those longer than original / low_freq_factor are
    stretched by the scaling factor, and those in between are blended linearly (Llama 3.1 release).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling_factor == 1.0:
        return frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    periods_in_context = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    keep = ((periods_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / config.rope_scaling_factor)


def rope_cache(config: DecoderConfig, seq_len: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..seq_len-1, each (S, H/2), float32."""
    angles = torch.outer(
        torch.arange(seq_len, dtype=torch.float32, device=device), rope_frequencies(config, device=device)
    )
    return angles.cos(), angles.sin()


class SequenceLayout:
    """Which positions a rank holds: here, all of them.

    `hidden_shards` is the number of sequence shards of the hidden state between pipeline parts (the tensor-parallel
    degree): an inner part sees only its shard but needs the full length.
    """

    hidden_shards = 1

    def context(self, cos: Tensor, sin: Tensor, num_tokens: int, positions_BT: Tensor | None) -> SequenceContext:
        """The context of a forward pass over `num_tokens` positions of this rank.

        Args:
            cos, sin: rotary tables of all positions the model is built for.
            positions_BT: each token's position in its document, for the whole sequence; attention then stays within
                each run of positions that starts at 0.
        """
        assert num_tokens <= cos.shape[0], f"sequence of {num_tokens} tokens in a model built for {cos.shape[0]}"
        if positions_BT is None:
            return SequenceContext(cos[:num_tokens], sin[:num_tokens], None)
        same_document = documents_of(positions_BT).unsqueeze(2) == documents_of(positions_BT).unsqueeze(1)
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=positions_BT.device).tril()
        return SequenceContext(cos[positions_BT], sin[positions_BT], (same_document & causal).unsqueeze(1))


def documents_of(positions_BT: Tensor) -> Tensor:
    """The number of each position's document."""
    return (positions_BT == 0).cumsum(dim=1)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), in float32: logits that cannot leave (-softcap, softcap) (Gemma 2, 2024)."""
    return logits if softcap is None else softcap * torch.tanh(logits.float() / softcap)


def cross_entropy_sum(
    logits_BSV: Tensor, labels_BS: Tensor, *, softcap: float | None = None, z_loss: ZLoss | None = None
) -> Tensor:
    """Sum over valid positions of the negative log-likelihood, in float32, as a tensor of shape (1,).

    Not a scalar: a pipeline concatenates its microbatches' results along the first dimension.

    Args:
        logits_BSV: as the head computes them, before the softcap.
        z_loss: its gradient is added to that of the sum.
    """
    logits_NV, labels_N = softcapped(logits_BSV.flatten(0, 1).float(), softcap), labels_BS.flatten()
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
    # With the vocabulary sharded (loss parallel) the sum is a DTensor, the same on all ranks.
    loss = local_of(loss)
    if z_loss is not None and torch.is_grad_enabled():
        loss = z_loss.attached(loss, logits_NV, labels_N)
    # FSDP registers hooks on the result, which must not be a view: stack copies.
    return torch.stack([loss])


class LossHead(nn.Module):
    """A head that computes the loss itself: `head(hidden_BSD, labels_BS)` returns the sum of losses, shape (1,).

    Without labels it returns logits, before the softcap.
    """

    weight: Tensor
    z_loss: ZLoss | None = None


class Decoder(nn.Module):
    """The whole model. A pipeline part lacks some layers, or has `tok_embeddings`, `norm` or `output` set to None."""

    block: Callable[[DecoderConfig], nn.Module]
    """The family's transformer block, called as `block(x_BSD, context)`."""

    def __init__(self, config: DecoderConfig, seq_len: int) -> None:
        super().__init__()
        self.config = config
        self.seq_len = seq_len
        self.sequence = SequenceLayout()
        self.sums: dict[str, Tensor] = {}
        """What training passes add up for the log, by the stage that measures it."""
        self.loss: Callable[..., Tensor] = cross_entropy_sum
        if config.logit_softcap is not None:
            self.loss = functools.partial(cross_entropy_sum, softcap=config.logit_softcap)
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(layer): self.block(config) for layer in range(config.num_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output_scale = output_scale(config)
        self.output: nn.Linear | LossHead | None = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie_weights()
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", torch.empty(seq_len, config.head_dim // 2), persistent=False)
        self.register_buffer("rope_sin", torch.empty(seq_len, config.head_dim // 2), persistent=False)

    def tie_weights(self) -> None:
        """Makes the head share the embedding's weight, if the config says so and both are in this part."""
        if self.config.tie_word_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def materialized(self, device: torch.device) -> None:
        """Call when the model has left the meta device, which unties weights and leaves buffers empty."""
        self.tie_weights()
        # New tensors, not copies into the old ones: those were cast to the parameters' dtype, and angles need float32.
        self.rope_cos, self.rope_sin = rope_cache(self.config, self.seq_len, device)

    def forward(self, tokens: Tensor, positions_BT: Tensor | None = None, labels_BS: Tensor | None = None) -> Tensor:
        """From token ids (B, S) to logits (B, S, V) or, with labels, to the sum of losses, shape (1,).

        An inner pipeline part takes and returns hidden states. With `positions_BT` attention stays within each run of
        positions that starts at 0.
        """
        num_tokens = tokens.shape[1]
        if self.tok_embeddings is None:
            num_tokens *= self.sequence.hidden_shards
        context = self.sequence.context(self.rope_cos, self.rope_sin, num_tokens, positions_BT)
        x_BSD = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            x_BSD = layer(x_BSD, context)
        x_BSD = self.norm(x_BSD) if self.norm is not None else x_BSD
        if self.output is None:
            return x_BSD
        if self.output_scale != 1.0:
            x_BSD = x_BSD * self.output_scale  # here and not on the logits, which are larger and may never exist
        if labels_BS is None:
            return softcapped(self.output(x_BSD), self.config.logit_softcap)
        if isinstance(self.output, LossHead):
            return self.output(x_BSD, labels_BS)
        return self.loss(self.output(x_BSD), labels_BS)


def fsdp_units(part: Decoder) -> list[list[nn.Module]]:
    """The groups of modules that FSDP shards and gathers together, in forward order.

    The backward pass needs the last group, norm and head, at once, so it stays gathered. With a tied head in the same
    part the embedding belongs to the root.
    """
    units: list[list[nn.Module]] = []
    tied = part.config.tie_word_embeddings and part.tok_embeddings is not None and part.output is not None
    if part.tok_embeddings is not None and not tied:
        units.append([part.tok_embeddings])
    units += [[layer] for layer in part.layers.values()]
    if part.norm is not None and part.output is not None and not tied:
        units.append([part.norm, part.output])
    return units


def tensor_parallel_plan(part: Decoder, block: dict[str, Split]) -> dict[str, Split]:
    """Module name -> how it is split; `block` is the plan of one block."""
    plan = {}
    if part.tok_embeddings is not None:
        plan["tok_embeddings"] = Split.VOCABULARY
    for layer in part.layers:
        plan |= {f"layers.{layer}.{name}": split for name, split in block.items()}
    if part.norm is not None:
        plan["norm"] = Split.SEQUENCE
    if part.output is not None:
        plan["output"] = Split.HEAD
    return plan
