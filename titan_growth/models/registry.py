"""Families and flavors by name, and the `DecoderConfig` of a `[model]` table.

A family is a module with `Decoder`, `fsdp_units`, `tensor_parallel_plan`, `init_rule`, the `ROLES` of its parameters'
dimensions, and its named sizes: `FLAVORS`, with `DEFAULTS` where what they leave open is not `DecoderConfig`'s.
"""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields, replace
from types import ModuleType
from typing import Any

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.model import ModelConfig, ModelInitConfig, MupConfig
from titan_growth.models.config import BaseSizes, DecoderConfig, swiglu_hidden_dim
from titan_growth.models.initial_values import InitScheme
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.findings import Findings

FAMILIES: dict[str, str] = {"llama3": "titan_growth.models.llama", "qwen3": "titan_growth.models.qwen3"}
"""Family -> its module."""

_DEFAULTS = {entry.name: entry.default for entry in fields(DecoderConfig) if entry.default is not MISSING}
"""Defaults of the sizes that have one; their keys in table, flavor and family are the names in `DecoderConfig`."""

_NOT_SIZES = {
    "name",
    "flavor",
    "hf_assets_path",
    "converters",
    "print_after_conversion",
    "init",
    "parametrization",
    "mup",
}

SIZE_KEYS = ("dim", "n_layers", "n_heads", "vocab_size")
"""Keys that a custom flavor must set."""


def family_module(name: str) -> ModuleType:
    """The module of a family; importing it imports torch."""
    return importlib.import_module(FAMILIES[name])


def model_config_of(section: ModelConfig, found: Findings) -> DecoderConfig | None:
    """The `DecoderConfig` that a `[model]` table describes; None when something is wrong with the table."""
    if section.name not in FAMILIES:
        known = ", ".join(FAMILIES)
        hint = suggestion(section.name, FAMILIES)
        found.problem("model.name", f"unknown model family '{section.name}'; known: {known}", hint)
        return None
    family = family_module(section.name)
    flavors = family.FLAVORS
    if section.flavor not in flavors:
        known = ", ".join(flavors)
        hint = suggestion(section.flavor, flavors)
        found.problem("model.flavor", f"unknown flavor '{section.flavor}'; known: {known}", hint)
        return None
    given = section.model_dump(exclude_none=True, exclude=_NOT_SIZES)
    values = {**_DEFAULTS, **family.DEFAULTS, **flavors[section.flavor], **given}
    if missing := [key for key in SIZE_KEYS if key not in values]:
        for key in missing:
            found.problem(f"model.{key}", 'is missing; flavor = "custom" needs every size')
        return None
    own = Findings()
    _check_sizes(values, own, explicit=given)
    values["init"] = _init_scheme(section.init, values, own, explicit=given)
    _check_mup(section, own, explicit=given)
    found.extend(own)
    if own.problems:
        return None
    config = _config(values, explicit=given)
    return config if section.parametrization == "standard" else replace(config, mup=_base_sizes(section.mup, config))


def vocab_size_of(section: ModelConfig) -> int:
    """The vocabulary of the model that a `[model]` table describes. Raises ConfigError when it describes none."""
    config = model_config_of(section, found := Findings())
    if config is None:
        raise ConfigError(found.problems)
    return config.vocab_size


def _check_sizes(values: dict[str, Any], found: Findings, *, explicit: dict[str, Any]) -> None:
    dim, num_heads = values["dim"], values["n_heads"]
    if "head_dim" not in values and dim % num_heads:
        hint = "Choose sizes that divide, or give model.head_dim"
        found.problem("model.n_heads", f"{num_heads} heads do not divide model.dim = {dim}", hint)
    elif (head_dim := _head_dim(values)) % 2:
        origin = "" if "head_dim" in values else " (model.dim / model.n_heads)"
        message = f"{head_dim}{origin} is odd, but rotary embeddings need pairs of channels"
        found.problem("model.head_dim", message, "Choose sizes that make it even")
    if num_heads % (num_kv_heads := _num_kv_heads(values)):
        message = f"{num_kv_heads} key/value heads do not divide model.n_heads = {num_heads}"
        found.problem("model.n_kv_heads", message, "Choose a divisor")
    if values["rope_low_freq_factor"] >= values["rope_high_freq_factor"] and values["rope_scaling_factor"] != 1:
        found.problem("model.rope_low_freq_factor", "must be less than model.rope_high_freq_factor")
    if "hidden_dim" in explicit:
        for key in ("ffn_dim_multiplier", "multiple_of"):
            if key in explicit:
                found.problem(f"model.{key}", "conflicts with model.hidden_dim", "Give one or the other")
    if "qk_norm_eps" in explicit and not values["qk_norm"]:
        message = "has no meaning for a family whose queries and keys have no norms"
        found.problem("model.qk_norm_eps", message, "Remove it")


def _init_scheme(
    section: ModelInitConfig, values: dict[str, Any], found: Findings, *, explicit: dict[str, Any]
) -> InitScheme:
    """The flavor's scheme with what `[model.init]` changes; what would change nothing is a problem."""
    given = section.model_dump(exclude_none=True)
    scheme = replace(values["init"], **given)
    if "std" in given and scheme.scheme != "normal":
        message = f"has no meaning for scheme '{scheme.scheme}'"
        found.problem("model.init.std", message, 'Set model.init.scheme = "normal", or the deviation of a group')
    if "embedding_std" in given and values["tie_word_embeddings"]:
        message = "has no meaning for a tied embedding, which starts as the head it is too"
        found.problem("model.init.embedding_std", message, "Set model.init.head_std")
    if "depth_init" in explicit and scheme.scheme == "gstack":
        message = "has no meaning for model.init.scheme 'gstack', which does not know the depth"
        found.problem("model.depth_init", message, "Remove it, or choose another scheme")
    return scheme


def _check_mup(section: ModelConfig, found: Findings, *, explicit: dict[str, Any]) -> None:
    """The base sizes that the parametrisation needs are there, and no others."""
    name, given = section.parametrization, section.mup.model_dump(exclude_none=True)
    needs = {"standard": (), "mup": ("base_dim",), "completep": ("base_dim", "base_n_layers")}[name]
    for key in needs:
        if key not in given:
            message = f"is missing: model.parametrization = '{name}' scales from the size of a base model"
            found.problem(f"model.mup.{key}", message, "Give that of the model the learning rate was tuned at")
    for key in given:
        if name == "standard" or (name == "mup" and key == "base_n_layers"):
            hint = 'Set model.parametrization = "completep"' + (' or "mup"' if name == "standard" else "")
            found.problem(f"model.mup.{key}", f"has no meaning for model.parametrization = '{name}'", hint)
    if name == "completep" and "depth_init" in explicit:
        message = "has no meaning for model.parametrization = 'completep', which starts every depth as the base's"
        found.problem("model.depth_init", message, "Remove it")


def _base_sizes(section: MupConfig, config: DecoderConfig) -> BaseSizes:
    """The base sizes of a model, with those that are left open in the model's own proportions."""
    dim = section.base_dim
    assert dim is not None, "the base width is required"
    head_dim, share = section.base_head_dim or config.head_dim, dim / config.dim
    heads = section.base_n_heads or max(1, round(share * config.num_heads * config.head_dim / head_dim))
    return BaseSizes(
        dim=dim,
        num_heads=heads,
        num_kv_heads=section.base_n_kv_heads or max(1, round(heads * config.num_kv_heads / config.num_heads)),
        head_dim=head_dim,
        hidden_dim=section.base_hidden_dim or max(1, round(share * config.hidden_dim)),
        num_layers=section.base_n_layers,
    )


def base_keys(base: BaseSizes) -> dict[str, int | None]:
    """The keys of `[model.mup]` that say all of a base's sizes."""
    return {
        "base_dim": base.dim,
        "base_n_layers": base.num_layers,
        "base_n_heads": base.num_heads,
        "base_n_kv_heads": base.num_kv_heads,
        "base_head_dim": base.head_dim,
        "base_hidden_dim": base.hidden_dim,
    }


def _num_kv_heads(values: dict[str, Any]) -> int:
    return int(values.get("n_kv_heads") or values["n_heads"])


def _head_dim(values: dict[str, Any]) -> int:
    return int(values.get("head_dim") or values["dim"] // values["n_heads"])


def _config(values: dict[str, Any], *, explicit: dict[str, Any]) -> DecoderConfig:
    dim, hidden_dim = values["dim"], values.get("hidden_dim")
    if any(key in explicit for key in ("ffn_dim_multiplier", "multiple_of")):
        hidden_dim = None  # the override beats the flavor's explicit width
    return DecoderConfig(
        dim=dim,
        num_layers=values["n_layers"],
        num_heads=values["n_heads"],
        num_kv_heads=_num_kv_heads(values),
        head_dim=_head_dim(values),
        hidden_dim=hidden_dim
        or swiglu_hidden_dim(dim, values.get("ffn_dim_multiplier"), values.get("multiple_of") or 256),
        vocab_size=values["vocab_size"],
        **{key: values[key] for key in _DEFAULTS},
    )
