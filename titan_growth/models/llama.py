"""The Llama 3 family: grouped-query attention, rotary embeddings, SwiGLU, RMSNorm.

Pure math. What surrounds the blocks is in `decoder.py`; how the model is sharded and initialised is declared beside the
math (`fsdp_units`, `tensor_parallel_plan`, `init_rule`), so parallelism code need not know the family. Parameter names
are torchtitan's.

Shape suffixes: B batch, S sequence, D model width, F SwiGLU width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_growth.models import decoder
from titan_growth.models.config import DecoderConfig
from titan_growth.models.decoder import SequenceContext, Split, fsdp_units
from titan_growth.models.hugging_face import HuggingFaceLayout
from titan_growth.models.initial_values import Group, InitialValues, InitScheme
from titan_growth.models.parametrization import branch_scale, init_depth, query_scale, ratio
from titan_growth.models.roles import Role, axis_lengths

__all__ = ["DEFAULTS", "FLAVORS", "HUGGING_FACE", "ROLES", "Decoder", "fsdp_units", "init_rule", "tensor_parallel_plan"]

_RELEASE = {"n_kv_heads": 8, "vocab_size": 128256}
_GSTACK = {"rope_theta": 10000.0, "rope_scaling_factor": 1.0, "vocab_size": 32000, "max_seq_len": 2048,
           "init": InitScheme("gstack")}  # fmt: skip

FLAVORS: dict[str, dict[str, Any]] = {
    "custom": {},
    "debugmodel": {"dim": 256, "n_layers": 6, "n_heads": 16, "vocab_size": 2048},
    "debugmodel_wide": {"dim": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 8192},
    "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, **_RELEASE},
    "70B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096, **_RELEASE},
    "405B": {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, **_RELEASE},
    "gstack_410M": {"dim": 1024, "n_layers": 24, "n_heads": 16, "hidden_dim": 2816, **_GSTACK},
    "gstack_1.1B": {"dim": 2048, "n_layers": 24, "n_heads": 32, "hidden_dim": 5632, **_GSTACK},
    "gstack_3B": {"dim": 2560, "n_layers": 32, "n_heads": 20, "n_kv_heads": 4, "hidden_dim": 7040, **_GSTACK},
    "gstack_7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "hidden_dim": 11008, **_GSTACK},
}
"""The llama3 flavors are those of the Llama 3.1 release as torchtitan lists them; the gstack flavors are the models of
the G_stack paper (Du et al., NeurIPS 2024), as in its released configurations and checkpoints. The paper's names are
nominal: "7B" has 5.93B parameters."""

DEFAULTS: dict[str, Any] = {}
"""A flavor leaves nothing open for which the defaults of `DecoderConfig` are not Llama 3's."""


def apply_rope(x_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs (2i, 2i+1), as Meta's and torchtitan's code do.

    cos and sin have shape (S, H/2), or (B, S, H/2) if each row has its own positions.
    """
    cos, sin = (table.unsqueeze(-2) for table in (cos, sin))
    even, odd = x_BSNH.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_BSNH.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query_scale = query_scale(config)
        self.wq = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        # -1 for the heads: under tensor parallelism each rank holds only some of them.
        q_BSNH = self.scaled(self.wq(x_BSD).unflatten(-1, (-1, self.head_dim)))
        k_BSKH = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSKH = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSNH = apply_rope(q_BSNH, context.cos, context.sin)
        k_BSKH = apply_rope(k_BSKH, context.cos, context.sin)
        return self.wo(context.attend(q_BSNH, k_BSKH, v_BSKH))

    def scaled(self, q_BSNH: Tensor) -> Tensor:
        """Queries for which kernels that divide by sqrt(head_dim) compute the parametrisation's attention."""
        return q_BSNH if self.query_scale == 1.0 else q_BSNH * self.query_scale


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class TransformerBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.branch_scale = branch_scale(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x_BSD: Tensor, context: SequenceContext) -> Tensor:
        x_BSD = self.plus(x_BSD, self.attention(self.attention_norm(x_BSD), context=context))
        return self.plus(x_BSD, self.feed_forward(self.ffn_norm(x_BSD)))

    def plus(self, x_BSD: Tensor, branch_BSD: Tensor) -> Tensor:
        """The residual stream with what a branch adds."""
        return x_BSD + branch_BSD if self.branch_scale == 1.0 else x_BSD + self.branch_scale * branch_BSD


class Decoder(decoder.Decoder):
    """A Llama model, or a pipeline part of one."""

    block = TransformerBlock


def tensor_parallel_plan(part: decoder.Decoder) -> dict[str, Split]:
    """Module name -> how tensor parallelism splits it."""
    return decoder.tensor_parallel_plan(
        part,
        {
            "attention_norm": Split.SEQUENCE,
            "attention": Split.GATHER_INPUT,
            "attention.wq": Split.COLUMNS,
            "attention.wk": Split.COLUMNS,
            "attention.wv": Split.COLUMNS,
            "attention.wo": Split.ROWS,
            "ffn_norm": Split.SEQUENCE,
            "feed_forward": Split.GATHER_INPUT,
            "feed_forward.w1": Split.COLUMNS,
            "feed_forward.w3": Split.COLUMNS,
            "feed_forward.w2": Split.ROWS,
        },
    )


ROLES: dict[str, Role] = {
    **decoder.ROLES,
    "attention_norm.weight": Role(("dim",)),
    "attention.wq.weight": Role(("heads", "dim"), reads=1),
    "attention.wk.weight": Role(("kv_heads", "dim"), reads=1),
    "attention.wv.weight": Role(("kv_heads", "dim"), reads=1),
    "attention.wo.weight": Role(("dim", "heads"), reads=1),
    "ffn_norm.weight": Role(("dim",)),
    "feed_forward.w1.weight": Role(("hidden_dim", "dim"), reads=1),
    "feed_forward.w3.weight": Role(("hidden_dim", "dim"), reads=1),
    "feed_forward.w2.weight": Role(("dim", "hidden_dim"), reads=1),
}
"""Role of each parameter, for width growth."""

HUGGING_FACE = HuggingFaceLayout(
    model_type="llama",
    architecture="LlamaForCausalLM",
    names={
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "attention_norm.weight": "input_layernorm.weight",
        "attention.wq.weight": "self_attn.q_proj.weight",
        "attention.wk.weight": "self_attn.k_proj.weight",
        "attention.wv.weight": "self_attn.v_proj.weight",
        "attention.wo.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.w1.weight": "mlp.gate_proj.weight",
        "feed_forward.w3.weight": "mlp.up_proj.weight",
        "feed_forward.w2.weight": "mlp.down_proj.weight",
    },
    neighbours=frozenset({"attention.wq.weight", "attention.wk.weight"}),
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0},
    required={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    ignored=("rotary_emb.inv_freq",),
    heads_divide_width=True,
)
"""The model in `transformers`."""


def init_rule(config: DecoderConfig, name: str) -> InitialValues | None:
    """The distribution of a parameter's initial values by `config.init`, or None for ones."""
    leaf = name.split(".")[-2]
    if "norm" in leaf:
        return None
    tied = config.tie_word_embeddings
    dim = config.dim / ratio(config, "dim")
    if leaf in ("tok_embeddings", "output"):
        group: Group = "embedding" if leaf == "tok_embeddings" else "head"
        return config.init.values(group, dim=dim, fan_in=dim, depth=None, tied=tied)
    writes = leaf in ("wo", "w2")
    reads = {"wo": "heads", "w2": "hidden_dim"}.get(leaf, "dim")
    wider = ratio(config, reads)
    depth = init_depth(config, int(name.split(".")[1]))
    shrinks = writes or (leaf == "w3" and config.init.scheme in ("torchtitan", "small"))
    at_base = config.init.values(
        "writers" if writes else "readers",
        dim=dim,
        fan_in=axis_lengths(config)[reads] / wider,
        depth=depth if shrinks else None,
        tied=tied,
    )
    return at_base.times(wider**-0.5)
