"""Families and flavors by name, and the step from the `[model]` table to a `ModelConfig`.

The llama3 flavors are those of the Llama 3.1 release as torchtitan lists them; the gstack flavors are the sizes that
the G_stack paper (Du et al., NeurIPS 2024) trained, as its released configurations and checkpoints have them. The
paper's names are rounder than its models: "7B" has 5.93B parameters.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from titan_growth.config.messages import suggestion
from titan_growth.config.model_schema import Model
from titan_growth.models.config import ModelConfig, swiglu_hidden_dim
from titan_growth.tools.errors import Problem

FAMILIES: dict[str, str] = {"llama3": "titan_growth.models.llama"}
"""Family -> module that has `Decoder`, `init_rule` and `fsdp_units`."""

_GSTACK = {"rope_theta": 10000.0, "rope_scaling_factor": 1.0, "vocab_size": 32000, "max_seq_len": 2048}

FLAVORS: dict[str, dict[str, dict[str, Any]]] = {
    "llama3": {
        "custom": {},
        "debugmodel": {"dim": 256, "n_layers": 6, "n_heads": 16, "vocab_size": 2048},
        "debugmodel_wide": {"dim": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 8192},
        "8B": {
            "dim": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "n_kv_heads": 8,
            "vocab_size": 128256,
            "ffn_dim_multiplier": 1.3,
            "multiple_of": 1024,
        },
        "70B": {
            "dim": 8192,
            "n_layers": 80,
            "n_heads": 64,
            "n_kv_heads": 8,
            "vocab_size": 128256,
            "ffn_dim_multiplier": 1.3,
            "multiple_of": 4096,
        },
        "405B": {
            "dim": 16384,
            "n_layers": 126,
            "n_heads": 128,
            "n_kv_heads": 8,
            "vocab_size": 128256,
            "ffn_dim_multiplier": 1.2,
            "multiple_of": 4096,
        },
        "gstack_410M": {"dim": 1024, "n_layers": 24, "n_heads": 16, "hidden_dim": 2816, **_GSTACK},
        "gstack_1.1B": {"dim": 2048, "n_layers": 24, "n_heads": 32, "hidden_dim": 5632, **_GSTACK},
        "gstack_3B": {"dim": 2560, "n_layers": 32, "n_heads": 20, "n_kv_heads": 4, "hidden_dim": 7040, **_GSTACK},
        "gstack_7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "hidden_dim": 11008, **_GSTACK},
    },
}

_DEFAULTS: dict[str, Any] = {
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_seq_len": 8192,
    "max_seq_len": 131072,
    "depth_init": True,
    "tie_word_embeddings": False,
}

SIZE_KEYS = ("dim", "n_layers", "n_heads", "vocab_size")
"""What a custom flavor must spell out."""


def family_module(name: str) -> ModuleType:
    """The module of a family; importing it imports torch."""
    return importlib.import_module(FAMILIES[name])


def model_config_of(section: Model) -> tuple[ModelConfig | None, list[Problem]]:
    """The `ModelConfig` that a `[model]` table describes, or what is wrong with the table. Pure, without torch."""
    if section.name not in FAMILIES:
        known = ", ".join(FAMILIES)
        hint = suggestion(section.name, FAMILIES)
        return None, [Problem("model.name", f"unknown model family '{section.name}'; known: {known}", hint)]
    flavors = FLAVORS[section.name]
    if section.flavor not in flavors:
        known = ", ".join(flavors)
        hint = suggestion(section.flavor, flavors)
        return None, [Problem("model.flavor", f"unknown flavor '{section.flavor}'; known: {known}", hint)]
    given = section.model_dump(exclude_none=True, exclude={"name", "flavor", "hf_assets_path", "converters", "print_after_conversion"})
    values = {**_DEFAULTS, **flavors[section.flavor], **given}
    missing = [key for key in SIZE_KEYS if key not in values]
    if missing:
        return None, [Problem(f"model.{key}", 'is missing; flavor = "custom" needs every size') for key in missing]
    return _config(values, explicit=given)


def _config(values: dict[str, Any], explicit: dict[str, Any]) -> tuple[ModelConfig | None, list[Problem]]:
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
    if problems:
        return None, problems
    hidden_dim = values.get("hidden_dim")
    if any(key in explicit for key in ("ffn_dim_multiplier", "multiple_of")):
        hidden_dim = None  # the override beats the flavor's explicit width
    return ModelConfig(
        dim=dim,
        num_layers=values["n_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim
        or swiglu_hidden_dim(dim, values.get("ffn_dim_multiplier"), values.get("multiple_of") or 256),
        vocab_size=values["vocab_size"],
        **{key: values[key] for key in _DEFAULTS},
    ), []
