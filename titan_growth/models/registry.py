"""Families and flavors by name, and the step from the `[model]` table to a `DecoderConfig`.

A family is a module with `Decoder`, `fsdp_units`, `tensor_parallel_plan`, `init_rule`, the `ROLES` of its parameters'
dimensions, and its named sizes: `FLAVORS` with the `DEFAULTS` of what they leave open.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.model import ModelConfig
from titan_growth.models.config import DecoderConfig, swiglu_hidden_dim
from titan_growth.tools.errors import ConfigError, Problem

FAMILIES: dict[str, str] = {"llama3": "titan_growth.models.llama", "qwen3": "titan_growth.models.qwen3"}
"""Family -> its module."""

_CONFIG_KEYS = (
    "norm_eps",
    "rope_theta",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_seq_len",
    "max_seq_len",
    "depth_init",
    "tie_word_embeddings",
    "qk_norm",
)
"""Keys that pass from the table, the flavor or the family's defaults into the `DecoderConfig` as they are."""

_NOT_SIZES = {"name", "flavor", "hf_assets_path", "converters", "print_after_conversion"}

SIZE_KEYS = ("dim", "n_layers", "n_heads", "vocab_size")
"""What a custom flavor must spell out."""


def family_module(name: str) -> ModuleType:
    """The module of a family; importing it imports torch."""
    return importlib.import_module(FAMILIES[name])


def model_config_of(section: ModelConfig) -> tuple[DecoderConfig | None, list[Problem]]:
    """The `DecoderConfig` that a `[model]` table describes, or what is wrong with the table."""
    if section.name not in FAMILIES:
        known = ", ".join(FAMILIES)
        hint = suggestion(section.name, FAMILIES)
        return None, [Problem("model.name", f"unknown model family '{section.name}'; known: {known}", hint)]
    family = family_module(section.name)
    flavors = family.FLAVORS
    if section.flavor not in flavors:
        known = ", ".join(flavors)
        hint = suggestion(section.flavor, flavors)
        return None, [Problem("model.flavor", f"unknown flavor '{section.flavor}'; known: {known}", hint)]
    given = section.model_dump(
        exclude_none=True, exclude={"name", "flavor", "hf_assets_path", "converters", "print_after_conversion"}
    )
    values = {**family.DEFAULTS, **flavors[section.flavor], **given}
    missing = [key for key in SIZE_KEYS if key not in values]
    if missing:
        return None, [Problem(f"model.{key}", 'is missing; flavor = "custom" needs every size') for key in missing]
    return _config(values, explicit=given)


def vocab_size_of(section: ModelConfig) -> int:
    """The vocabulary of the model that a `[model]` table describes. Raises ConfigError when it describes none."""
    config, problems = model_config_of(section)
    if config is None:
        raise ConfigError(problems)
    return config.vocab_size


def _config(values: dict[str, Any], explicit: dict[str, Any]) -> tuple[DecoderConfig | None, list[Problem]]:
    problems = []
    dim, num_heads = values["dim"], values["n_heads"]
    num_kv_heads = values.get("n_kv_heads") or num_heads
    if "head_dim" not in values and dim % num_heads:
        hint = "Choose sizes that divide, or give model.head_dim"
        problems.append(Problem("model.n_heads", f"{num_heads} heads do not divide model.dim = {dim}", hint))
    head_dim = values.get("head_dim") or dim // num_heads
    if not problems and head_dim % 2:
        origin = "" if "head_dim" in values else " (model.dim / model.n_heads)"
        message = f"{head_dim}{origin} is odd, but rotary embeddings need pairs of channels"
        problems.append(Problem("model.head_dim", message, "Choose sizes that make it even"))
    if num_heads % num_kv_heads:
        message = f"{num_kv_heads} key/value heads do not divide model.n_heads = {num_heads}"
        problems.append(Problem("model.n_kv_heads", message, "Choose a divisor"))
    if values["rope_low_freq_factor"] >= values["rope_high_freq_factor"] and values["rope_scaling_factor"] != 1:
        message = "must be less than model.rope_high_freq_factor"
        problems.append(Problem("model.rope_low_freq_factor", message))
    if "hidden_dim" in explicit:
        for key in ("ffn_dim_multiplier", "multiple_of"):
            if key in explicit:
                problems.append(Problem(f"model.{key}", "conflicts with model.hidden_dim", "Give one or the other"))
    if "qk_norm_eps" in explicit and not values["qk_norm"]:
        message = "has no meaning for a family whose queries and keys have no norms"
        problems.append(Problem("model.qk_norm_eps", message, "Remove it"))
    if problems:
        return None, problems
    hidden_dim = values.get("hidden_dim")
    if any(key in explicit for key in ("ffn_dim_multiplier", "multiple_of")):
        hidden_dim = None  # the override beats the flavor's explicit width
    return DecoderConfig(
        dim=dim,
        num_layers=values["n_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim
        or swiglu_hidden_dim(dim, values.get("ffn_dim_multiplier"), values.get("multiple_of") or 256),
        vocab_size=values["vocab_size"],
        qk_norm_eps=values.get("qk_norm_eps"),
        **{key: values[key] for key in _CONFIG_KEYS},
    ), []
