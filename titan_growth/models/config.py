"""The sizes of a decoder, and what follows from them alone: parameter counts and FLOPs.

A `DecoderConfig` is all that `build()` knows about a model, so growing means building from another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_growth.models.initial_values import TORCHTITAN, InitScheme


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """The sizes that hyper-parameters were tuned at (models/parametrization.py)."""

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    num_layers: int | None = None
    """None leaves the depth alone: muP. Otherwise it is scaled too: CompleteP."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a Llama-style decoder. Frozen, so a grown model is always a new config."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    max_seq_len: int = 131072
    depth_init: bool = True
    init: InitScheme = TORCHTITAN
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    """Normalise queries and keys per head (RMSNorm over the head's channels)."""
    qk_norm_eps: float | None = None
    """Epsilon of those norms; None for `norm_eps`. Width growth scales `norm_eps` and keeps this one."""
    logit_softcap: float | None = None
    """Logits are capped to (-logit_softcap, logit_softcap) by a tanh; None leaves them alone."""
    mup: BaseSizes | None = None
    """What muP or CompleteP scales from; None for the standard parametrisation."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that growth changes, by their recipe keys."""
        return {
            "n_layers": self.num_layers,
            "dim": self.dim,
            "n_heads": self.num_heads,
            "n_kv_heads": self.num_kv_heads,
            "hidden_dim": self.hidden_dim,
        }

    @property
    def tied(self) -> dict[str, str]:
        """Copies of parameters -> the name of the original."""
        return {"output.weight": "tok_embeddings.weight"} if self.tie_word_embeddings else {}

    @property
    def num_layer_params(self) -> int:
        """Parameters of one transformer block."""
        attention = 2 * self.dim * self.num_heads * self.head_dim + 2 * self.dim * self.num_kv_heads * self.head_dim
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        return attention + head_norms + 3 * self.dim * self.hidden_dim + 2 * self.dim

    @property
    def num_params(self) -> int:
        """All parameters; a tied head counts once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * self.num_layer_params + self.dim

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token: 6 x (parameters - input embedding) + 12 x layers x heads x head_dim x seq_len.

        torchtitan's formula: forward and backward, no causal halving, no recomputation. A tied embedding is also the
        output head, so it is not subtracted.
        """
        input_embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.dim
        attention = 12 * self.num_layers * self.num_heads * self.head_dim * seq_len
        return 6 * (self.num_params - input_embedding) + attention


def swiglu_hidden_dim(dim: int, ffn_dim_multiplier: float | None, multiple_of: int) -> int:
    """Llama's rule: 2/3 of 4 * dim, times the multiplier, rounded up to a multiple."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)
