"""The Llama 3 family: grouped-query attention, rotary embeddings, SwiGLU, RMSNorm.

Pure math. How the model is sharded and initialised is written beside it as data (`fsdp_units`, `init_rule`), so that no
parallelism needs to know that this is a llama. Parameter names are torchtitan's. Layers live in a `ModuleDict` keyed by
the *global* layer id: `layers.7` has that name on every pipeline rank and in every layout, which is what growth and
resharding rely on.

Shape suffixes: B batch, S sequence, D model width, F SwiGLU width, V vocabulary, N query heads, K key/value heads,
H head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_growth.models.config import ModelConfig


def rope_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Angular frequencies of the channel pairs, shape (H/2,), float32, with Llama 3.1 scaling.

    Wavelengths shorter than original / high_freq_factor stay, those longer than original / low_freq_factor are
    stretched by the scaling factor, and those between are blended linearly (Llama 3.1 release).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling_factor == 1.0:
        return frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    periods_in_context = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    keep = ((periods_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / config.rope_scaling_factor)


def rope_cache(config: ModelConfig, seq_len: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..seq_len-1, each of shape (S, H/2), float32."""
    angles = torch.outer(
        torch.arange(seq_len, dtype=torch.float32, device=device), rope_frequencies(config, device=device)
    )
    return angles.cos(), angles.sin()


def apply_rope(x_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs (2i, 2i+1), as Meta's and torchtitan's code do.

    cos and sin have shape (S, H/2), or (B, S, H/2) when every row has positions of its own.
    """
    cos, sin = (table.unsqueeze(-2) for table in (cos, sin))
    even, odd = x_BSNH.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_BSNH.dtype)


@dataclass(frozen=True)
class SequenceContext:
    """What attention needs to know about positions; the same for all layers of a forward pass."""

    cos: Tensor
    sin: Tensor
    mask_B1SS: Tensor | None
    """True where attention is allowed; None = plain causal."""


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_groups = config.num_heads // config.num_kv_heads
        self.wq = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        # -1 for the heads: under tensor parallelism each rank holds only some of them.
        q_BSNH = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSKH = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSKH = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSNH = apply_rope(q_BSNH, context.cos, context.sin)
        k_BSKH = apply_rope(k_BSKH, context.cos, context.sin)
        if self.num_groups > 1:
            k_BSKH = k_BSKH.repeat_interleave(self.num_groups, dim=2)
            v_BSKH = v_BSKH.repeat_interleave(self.num_groups, dim=2)
        out_BNSH = F.scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            k_BSKH.transpose(1, 2),
            v_BSKH.transpose(1, 2),
            attn_mask=context.mask_B1SS,
            is_causal=context.mask_B1SS is None,
        )
        return self.wo(out_BNSH.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class TransformerBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), context)
        return x_BSD + self.feed_forward(self.ffn_norm(x_BSD))


class Decoder(nn.Module):
    """The whole model. A pipeline part is one with some layers, `tok_embeddings`, `norm` or `output` set to None."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        self.config = config
        self.seq_len = seq_len
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(layer): TransformerBlock(config) for layer in range(config.num_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output: nn.Linear | None = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie_weights()
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", torch.empty(seq_len, config.head_dim // 2), persistent=False)
        self.register_buffer("rope_sin", torch.empty(seq_len, config.head_dim // 2), persistent=False)

    def tie_weights(self) -> None:
        """Makes the head share the embedding's weight, if the config says so."""
        if self.config.tie_word_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def materialized(self) -> None:
        """To be called when the model has left the meta device, which unties weights and leaves buffers empty."""
        self.tie_weights()
        # New tensors, not copies into the old ones: those have taken the parameters' dtype, and angles need float32.
        self.rope_cos, self.rope_sin = rope_cache(self.config, self.seq_len, device=self.rope_cos.device)

    def forward(self, tokens: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) from token ids (B, S); hidden states in and out for an inner pipeline part.

        With `positions_BS` attention stays inside each run of positions that starts at 0.
        """
        context = self._context(tokens.shape[1], positions_BS)
        x_BSD = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            x_BSD = layer(x_BSD, context)
        x_BSD = self.norm(x_BSD) if self.norm is not None else x_BSD
        return self.output(x_BSD) if self.output is not None else x_BSD

    def _context(self, seq_len: int, positions_BS: Tensor | None) -> SequenceContext:
        assert seq_len <= self.seq_len, f"sequence of {seq_len} tokens in a model built for {self.seq_len}"
        if positions_BS is None:
            return SequenceContext(self.rope_cos[:seq_len], self.rope_sin[:seq_len], None)
        document_BS = (positions_BS == 0).cumsum(dim=1)
        same_document = document_BS.unsqueeze(2) == document_BS.unsqueeze(1)
        causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=positions_BS.device).tril()
        mask_B1SS = (same_document & causal).unsqueeze(1)
        return SequenceContext(self.rope_cos[positions_BS], self.rope_sin[positions_BS], mask_B1SS)


def fsdp_units(part: Decoder) -> list[list[nn.Module]]:
    """The groups of modules that FSDP shards and gathers together, in the order of the forward pass.

    The last group, norm and head, is needed again at once by the backward pass, so it is kept gathered. With a tied
    head the embedding belongs to the root.
    """
    units: list[list[nn.Module]] = []
    tied = part.config.tie_word_embeddings
    if part.tok_embeddings is not None and not tied:
        units.append([part.tok_embeddings])
    units += [[layer] for layer in part.layers.values()]
    if part.norm is not None and part.output is not None and not tied:
        units.append([part.norm, part.output])
    return units


def init_rule(config: ModelConfig, name: str) -> float | None:
    """Standard deviation that a parameter starts from (truncated at three of them), or None for ones.

    Llama 3 as torchtitan trains it: 0.02 for the projections that read the residual stream; for those that write to it,
    and the SwiGLU gate's partner w3, 0.02 / sqrt(2 * depth), where depth is the layer's own (`depth_init`) or the
    model's; 1 for the embedding; dim ** -0.5 for the head.
    """
    leaf = name.split(".")[-2]
    if "norm" in leaf:
        return None
    if leaf == "tok_embeddings":
        return config.dim**-0.5 if config.tie_word_embeddings else 1.0
    if leaf == "output":
        return config.dim**-0.5
    if leaf in ("wq", "wk", "wv", "w1"):
        return 0.02
    depth = int(name.split(".")[1]) + 1 if config.depth_init else config.num_layers
    return 0.02 / math.sqrt(2 * depth)
