"""The dense Qwen3 family: a Llama block whose queries and keys are normalised, head by head, before rotation.

Pure math, as in `llama.py`, which has what the two families share. What differs:

    QK-norm      RMSNorm over the channels of each query and key, one weight for all heads of a layer. It bounds the
                 attention scores, however large wq and wk grow (Henry et al. 2020; Dehghani et al. 2023).
    head width   independent of dim / n_heads, 128 in every released model: wq need not be square.
    rotation     channel i pairs with channel i + H/2, as the released weights expect; llama's pairs are neighbours.
                 Same angles, different order of channels.
    tied head    in the models up to 4B.

Parameter names are torchtitan's.

Shape suffixes: B batch, S sequence, D model width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from titan_growth.models import decoder, llama
from titan_growth.models.config import DecoderConfig
from titan_growth.models.decoder import SequenceContext, Split, fsdp_units
from titan_growth.models.llama import init_rule
from titan_growth.models.roles import Role

__all__ = ["DEFAULTS", "FLAVORS", "HUGGING_FACE", "ROLES", "Decoder", "fsdp_units", "init_rule", "tensor_parallel_plan"]

_RELEASE = {"n_kv_heads": 8, "head_dim": 128, "vocab_size": 151936}
_TIED = {"tie_word_embeddings": True}

FLAVORS: dict[str, dict[str, Any]] = {
    "custom": {},
    "debugmodel": {
        "dim": 256,
        "n_layers": 8,
        "n_heads": 16,
        "n_kv_heads": 8,
        "head_dim": 64,
        "hidden_dim": 768,
        "vocab_size": 2048,
        **_TIED,
    },
    "0.6B": {"dim": 1024, "n_layers": 28, "n_heads": 16, "hidden_dim": 3072, **_RELEASE, **_TIED},
    "1.7B": {"dim": 2048, "n_layers": 28, "n_heads": 16, "hidden_dim": 6144, **_RELEASE, **_TIED},
    "4B": {"dim": 2560, "n_layers": 36, "n_heads": 32, "hidden_dim": 9728, **_RELEASE, **_TIED},
    "8B": {"dim": 4096, "n_layers": 36, "n_heads": 32, "hidden_dim": 12288, **_RELEASE},
    "14B": {"dim": 5120, "n_layers": 40, "n_heads": 40, "hidden_dim": 17408, **_RELEASE},
    "32B": {"dim": 5120, "n_layers": 64, "n_heads": 64, "hidden_dim": 25600, **_RELEASE},
}
"""The dense models of the Qwen3 release (April 2025)."""

DEFAULTS: dict[str, Any] = {
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling_factor": 1.0,
    "max_seq_len": 40960,
    "qk_norm": True,
}
"""What a flavor leaves open, where it is not Llama 3's."""


def apply_rope(x_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs (i, i + H/2), as the released weights expect.

    cos and sin have shape (S, H/2), or (B, S, H/2) if each row has its own positions.
    """
    cos, sin = (table.unsqueeze(-2) for table in (cos, sin))
    first, second = x_BSNH.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.to(x_BSNH.dtype)


class Attention(llama.Attention):
    """Causal grouped-query attention with QK-norm."""

    def __init__(self, config: DecoderConfig) -> None:
        assert config.qk_norm, "every Qwen3 model has QK-norm; a config without it counts too few parameters"
        super().__init__(config)
        eps = config.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
        self.q_norm = nn.RMSNorm(config.head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=eps)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        # -1 for the heads: under tensor parallelism each rank holds only some of them.
        q_BSNH = self.scaled(self.q_norm(self.wq(x_BSD).unflatten(-1, (-1, self.head_dim))))
        k_BSKH = self.k_norm(self.wk(x_BSD).unflatten(-1, (-1, self.head_dim)))
        v_BSKH = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSNH = apply_rope(q_BSNH, context.cos, context.sin)
        k_BSKH = apply_rope(k_BSKH, context.cos, context.sin)
        return self.wo(context.attend(q_BSNH, k_BSKH, v_BSKH))


class TransformerBlock(llama.TransformerBlock):
    """Llama's block with this family's attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config)


class Decoder(decoder.Decoder):
    """A Qwen3 model, or a pipeline part of one."""

    block = TransformerBlock


def tensor_parallel_plan(part: decoder.Decoder) -> dict[str, Split]:
    """Module name -> how tensor parallelism splits it."""
    norms = (f"layers.{layer}.attention.{norm}" for layer in part.layers for norm in ("q_norm", "k_norm"))
    return llama.tensor_parallel_plan(part) | dict.fromkeys(norms, Split.HEADS)


ROLES: dict[str, Role] = {
    **llama.ROLES,
    "attention.q_norm.weight": Role(("head_dim",)),
    "attention.k_norm.weight": Role(("head_dim",)),
}
"""Role of each parameter, for width growth."""

HUGGING_FACE = replace(
    llama.HUGGING_FACE,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    names={
        **llama.HUGGING_FACE.names,
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
    },
    neighbours=frozenset(),
    defaults={
        **llama.HUGGING_FACE.defaults,
        "max_position_embeddings": 32768,
        "head_dim": 128,
        "num_key_value_heads": 32,
    },
    required={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    heads_divide_width=False,
)
"""The model in `transformers`. Channels rotate in the same pairs, so nothing is permuted."""
