"""Converts between the `config.json` of a Hugging Face folder and the equivalent `[model]` table.

All Llama-like decoders use the same keys for their sizes. A family's own requirements and defaults are in its table
(`models/hugging_face.py`). Other keys are ignored, as `transformers` does.

The rotary settings have moved: `rope_theta` and `rope_scaling` up to transformers 4, both inside `rope_parameters` from
5 on. Both places are read, with the precedence of transformers 5, and both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from titan_growth.config.schema.model import ModelConfig
from titan_growth.models.config import DecoderConfig
from titan_growth.models.hugging_face import HuggingFaceLayout
from titan_growth.models.registry import FAMILIES, family_module, model_config_of
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError
from titan_growth.tools.findings import Findings

_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
}
"""Required keys."""

_OTHERS = {
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tie_word_embeddings",
}

_LLAMA3 = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_seq_len",
}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3}


def _families() -> dict[str, str]:
    """`model_type` -> the family with that layout."""
    layouts = {family: getattr(family_module(family), "HUGGING_FACE", None) for family in FAMILIES}
    return {layout.model_type: family for family, layout in layouts.items() if layout is not None}


def layout_of(family: str) -> HuggingFaceLayout:
    """The layout of a family. Raises CheckpointError if it has none."""
    layout: HuggingFaceLayout | None = getattr(family_module(family), "HUGGING_FACE", None)
    if layout is None:
        raise CheckpointError(f"the family '{family}' has no Hugging Face layout (HUGGING_FACE in its module)")
    return layout


@dataclass(frozen=True)
class DescribedModel:
    """The model of a config.json."""

    section: ModelConfig
    """The equivalent `[model]` table, with every size explicit."""
    config: DecoderConfig


def described_model(table: Mapping[str, Any], folder: str) -> DescribedModel:
    """The model of a config.json.

    Args:
        folder: name of its folder, for messages.

    Raises:
        CheckpointError: if its family is unknown, the family does not support a setting, or it is invalid.
    """
    refused = partial(RefusedCheckpointError, folder)
    model_type = table.get("model_type")
    families = _families()
    if not isinstance(model_type, str) or model_type not in families:
        raise refused(f"its config.json has the model_type {model_type!r:.60}; known: {', '.join(families)}")
    family = families[model_type]
    layout = layout_of(family)
    if table.get("quantization_config") is not None:
        raise refused("it is quantised (quantization_config in its config.json). Take the unquantised model")
    architectures = table.get("architectures")
    if architectures and architectures != [layout.architecture]:
        raise refused(f"its architecture is {architectures!s:.100}; only {layout.architecture} is supported")
    for key, allowed in layout.required.items():
        if (value := table.get(key, allowed[0])) not in allowed:
            raise refused(f"its config.json says {key} = {value!r:.60}; only {allowed[0]!r} is supported")
    types = table.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(one != "full_attention" for one in types)):
        raise refused("not all of its layers have full attention (layer_types in its config.json)")
    if missing := [key for key in _SIZES if table.get(key) is None]:
        raise refused(f"its config.json has no {missing[0]}")
    values = {recipe_key: table[key] for key, recipe_key in _SIZES.items()}
    for key, recipe_key in _OTHERS.items():
        value = table.get(key, layout.defaults.get(key))
        if value is not None:
            values[recipe_key] = value
    values |= _rope(table, layout, refused)
    try:
        section = ModelConfig.model_validate({"name": family, "flavor": "custom", **values})
    except ValidationError as error:
        first = error.errors()[0]
        raise refused(f"its config.json is not valid ({first['loc'][0]}: {first['msg']})") from None
    config = model_config_of(section, found := Findings())
    if config is None:
        raise refused(f"its config.json does not describe a valid model ({found.problems[0]})")
    explicit = {key: getattr(config, key) for key in ("head_dim", "norm_eps", "tie_word_embeddings", "max_seq_len")}
    return DescribedModel(section.model_copy(update={"n_kv_heads": config.num_kv_heads, **explicit}), config)


def _rope(table: Mapping[str, Any], layout: HuggingFaceLayout, refused: Any) -> dict[str, Any]:
    """The rotary keys of the `[model]` table."""
    rope = table.get("rope_scaling") or table.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise refused("its rotary settings are not those of one model (rope_parameters in its config.json)")
    theta = rope.get("rope_theta", table.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise refused(f"its rotary embeddings are scaled by {kind!r:.60}; known: default, llama3")
    if rope.get("partial_rotary_factor", table.get("partial_rotary_factor", 1.0)) not in (None, 1):
        raise refused("only a part of each head is rotated (partial_rotary_factor in its config.json)")
    if unknown := sorted(map(str, rope.keys() - _ROPE_KEYS)):
        raise refused(f"its rotary settings have the unknown key {unknown[0]!r:.60}")
    values: dict[str, Any] = {
        "rope_theta": layout.defaults["rope_theta"] if theta is None else theta,
        "rope_scaling_factor": 1.0,
    }
    if kind == "llama3":
        context = table.get("max_position_embeddings", layout.defaults["max_position_embeddings"])
        rope = {"original_max_position_embeddings": context, **rope}
        if missing := [key for key in _LLAMA3 if rope.get(key) is None]:
            raise refused(f"its rotary settings have no {missing[0]}")
        values |= {recipe_key: rope[key] for key, recipe_key in _LLAMA3.items()}
    return values


def config_json(config: DecoderConfig, family: str, dtype: str) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        dtype: of its weights, without `torch.`.

    Raises:
        CheckpointError: if no model of `transformers` computes the same.
    """
    layout = layout_of(family)
    what = f"transformers' {layout.architecture}"
    if config.qk_norm_eps not in (None, config.norm_eps):
        message = "norms of queries and keys with an epsilon of their own (model.qk_norm_eps), as after a width growth"
        raise CheckpointError(f"{what} has no {message}. It cannot be exported")
    if config.logit_softcap is not None:
        message = f"cap on its logits (model.logit_softcap = {config.logit_softcap:g})"
        raise CheckpointError(f"{what} has no {message}. It cannot be exported")
    if layout.heads_divide_width and config.dim % config.num_heads:
        message = f"a width of {config.dim} with {config.num_heads} heads, which do not divide it"
        raise CheckpointError(f"{what} refuses {message}. It cannot be exported")
    scaling: dict[str, Any] | None = None
    if config.rope_scaling_factor != 1:
        scaling = {"rope_type": "llama3", **{key: getattr(config, field) for key, field in _LLAMA3.items()}}
    return {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "dtype": dtype,
        "torch_dtype": dtype,
        "attention_dropout": 0.0,
        "use_cache": True,
        **{key: values[0] for key, values in layout.required.items()},
    }
