"""The `[model]` table. Its size keys are torchtitan's; they resolve to a `DecoderConfig`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from titan_growth.config.fields import suggestion
from titan_growth.config.section import BadValueError, Section
from titan_growth.config.torchtitan_keys import OLDER_CONVERTERS, UNSUPPORTED_CONVERTERS

CONVERTERS = ("quantize.linear.float8",)
"""What `model.converters` may name."""


class ModelInitConfig(Section):
    """What the weights start from. A group's deviation is divided for depth where the scheme does (depth_init)."""

    scheme: Literal["torchtitan", "normal", "small", "gstack"] | None = None
    """torchtitan's; normal = one std everywhere (GPT-2); small = torchtitan's with an embedding of 1 / sqrt(dim);
    gstack = PyTorch's defaults, as the paper's code has it. Default: torchtitan (gstack in the gstack flavors)."""
    std: float | None = Field(None, gt=0)
    """Standard deviation of scheme "normal". Default: 0.02."""
    embedding_std: float | None = Field(None, gt=0)
    """Standard deviation of the embedding, whatever the scheme."""
    head_std: float | None = Field(None, gt=0)
    """Standard deviation of the output head, and of the embedding when it is the head too."""
    readers_std: float | None = Field(None, gt=0)
    """Standard deviation of the projections that read the residual stream: wq, wk, wv, w1, w3."""
    writers_std: float | None = Field(None, gt=0)
    """Standard deviation of the projections that write to it, before the division for depth: wo, w2."""


class MupConfig(Section):
    """The model that the hyper-parameters were tuned at. A model of this size trains as under "standard"."""

    base_dim: int | None = Field(None, ge=1)
    """Its width. Required."""
    base_n_layers: int | None = Field(None, ge=1)
    """Its transformer blocks. Required for "completep", without meaning for "mup"."""
    base_n_heads: int | None = Field(None, ge=1)
    """Its query heads. Default: so many that the channels of all heads together are as many times base_dim as here."""
    base_n_kv_heads: int | None = Field(None, ge=1)
    """Its key/value heads. Default: as many for each query head as here."""
    base_head_dim: int | None = Field(None, ge=2)
    """The width of its heads. Default: that of this model, whose attention is then as under "standard"."""
    base_hidden_dim: int | None = Field(None, ge=1)
    """Its SwiGLU width. Default: as many times base_dim as here. Give it to compare models whose SwiGLU widths are not
    in proportion to their dims, as after rounding up to multiple_of."""


class ModelConfig(Section):
    """The model that the run ends with. Growth derives the smaller ones from it."""

    name: str = "llama3"
    """Model family: llama3 or qwen3."""
    flavor: str = "debugmodel"
    """Named sizes, or "custom" if all sizes are given here. A size key overrides the flavor's. llama3: debugmodel,
    debugmodel_wide, 8B, 70B, 405B, gstack_410M, gstack_1.1B, gstack_3B, gstack_7B. qwen3: debugmodel, 0.6B, 1.7B, 4B,
    8B, 14B, 32B."""
    hf_assets_path: str | None = None
    """Folder or URL with tokenizer.json (or tokenizer.model). Default: none (torchtitan: its own test tokenizer)."""
    converters: list[str] = []
    """Replacements of modules before sharding: "quantize.linear.float8"."""
    print_after_conversion: bool = False
    """Log the model's modules after the converters."""
    dim: int | None = Field(None, ge=1)
    """Width of the residual stream."""
    n_layers: int | None = Field(None, ge=0)
    """Transformer blocks of the final model; 0 leaves embedding, norm and head."""
    n_heads: int | None = Field(None, ge=1)
    """Query heads; must divide dim unless head_dim is given."""
    n_kv_heads: int | None = Field(None, ge=1)
    """Key/value heads (grouped-query attention); must divide n_heads. Default: n_heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of a head; even. Default: dim / n_heads."""
    vocab_size: int | None = Field(None, ge=2)
    """Rows of the embedding; a tokenizer larger than this is refused."""
    hidden_dim: int | None = Field(None, ge=1)
    """Width of the SwiGLU hidden layer. Default: torchtitan's rule from dim, ffn_dim_multiplier and multiple_of."""
    ffn_dim_multiplier: float | None = Field(None, gt=0)
    """Factor on 2/3 * 4 * dim before rounding up to multiple_of."""
    multiple_of: int | None = Field(None, ge=1)
    """The SwiGLU hidden width is rounded up to a multiple of this. Default: 256."""
    norm_eps: float | None = Field(None, gt=0)
    """Epsilon of RMSNorm. Default: 1e-5."""
    qk_norm_eps: float | None = Field(None, gt=0)
    """Epsilon of the norms of queries and keys, in families that have them (Qwen3). Default: norm_eps."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary frequencies. Default: 500000 (10000 in the gstack flavors)."""
    rope_scaling_factor: float | None = Field(None, ge=1)
    """Llama 3.1 frequency scaling; 1 switches it off. Default: 8 (1 in the gstack flavors), and 1 in a new run whose
    sequences are all shorter than the original context; weights from elsewhere keep theirs."""
    rope_low_freq_factor: float | None = Field(None, gt=0)
    """Llama 3.1 scaling: wavelengths above original / this are stretched by the full factor. Default: 1."""
    rope_high_freq_factor: float | None = Field(None, gt=0)
    """Llama 3.1 scaling: wavelengths below original / this stay as they are. Default: 4."""
    rope_original_max_seq_len: int | None = Field(None, ge=1)
    """Llama 3.1 scaling: context length of the unscaled model. Default: 8192."""
    max_seq_len: int | None = Field(None, ge=1)
    """Longest sequence of the model; training.seq_len may not exceed it. Default: 131072."""
    depth_init: bool | None = None
    """Scale the init of what writes to the residual stream (and of w3 in torchtitan's scheme) by the layer's own depth
    (true, default) or by the number of layers."""
    tie_word_embeddings: bool | None = None
    """Use the embedding as output head. Default: false."""
    logit_softcap: float | None = Field(None, gt=0)
    """Logits are this times tanh(logits / this), as in Gemma 2, which has 30. Default: none. Hugging Face's Llama and
    Qwen3 have no such cap, so a model with one cannot be exported."""
    parametrization: Literal["standard", "mup", "completep"] = "standard"
    """How initial weights, learning rates, weight decay and the factors of the forward pass depend on the size. mup:
    one learning rate for all widths (Yang et al., 2022); completep: for all depths too (Dey et al., 2025)."""
    mup: MupConfig = MupConfig()
    """See [model.mup]."""
    init: ModelInitConfig = ModelInitConfig()
    """See [model.init]."""

    @property
    def uses_float8(self) -> bool:
        """Whether linear layers are converted to Float8."""
        return "quantize.linear.float8" in self.converters

    @field_validator("converters")
    @classmethod
    def _known_converters(cls, value: list[str]) -> list[str]:
        names = [OLDER_CONVERTERS.get(name, name) for name in value]
        for name in names:
            if name in UNSUPPORTED_CONVERTERS:
                raise BadValueError(f"'{name}' is not supported in this version", f"Only {', '.join(CONVERTERS)} is")
            if name not in CONVERTERS:
                hint = suggestion(name, (*CONVERTERS, *OLDER_CONVERTERS))
                raise BadValueError(f"unknown converter '{name}'", hint or f"Known: {', '.join(CONVERTERS)}")
            if names.count(name) > 1:
                raise BadValueError(f"names '{name}' more than once")
        return names
