"""Warnings about keys that were changed although what they belong to is off.

Such a recipe is not wrong, but does less than its author may think. `IDLE` says which keys belong to what.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from titan_growth.config.schema.parallelism import ParallelismConfig
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.schema.techniques import Float8Config
from titan_growth.tools.findings import Findings

FLOAT8 = "quantize.linear.float8"
_PIPELINE, _CONTEXT = (
    [name for name in ParallelismConfig.model_fields if name.startswith(kind) and not name.endswith("_degree")]
    for kind in ("pipeline_parallel_", "context_parallel_")
)


class Idle(NamedTuple):
    """Keys of one table that do nothing while a condition holds."""

    table: str
    keys: tuple[str, ...]
    when: Callable[[Recipe], bool]
    reason: str


def _while(switch: str, value: object, table: str, *keys: str) -> Idle:
    """Keys that do nothing while another key has a value."""
    return Idle(table, keys, lambda recipe: _value(recipe, switch) == value, f"{switch} is {json.dumps(value)}")


def _unless_mode(mode: str, *keys: str) -> Idle:
    """Keys of activation checkpointing in one mode."""
    reason = f'activation_checkpoint.mode is not "{mode}"'
    return Idle("activation_checkpoint", keys, lambda recipe: recipe.activation_checkpoint.mode != mode, reason)


IDLE = (
    _while(
        "checkpoint.enable",
        False,
        "checkpoint",
        "async_mode",
        "enable_first_step_checkpoint",
        "initial_load_in_hf",
        "initial_load_path",
        "last_save_model_only",
        "load_only",
        "load_step",
        "permanent_interval",
        "save_retries",
    ),
    Idle(
        "checkpoint",
        ("async_mode", "permanent_interval", "save_retries"),
        lambda recipe: recipe.checkpoint.enable and recipe.checkpoint.load_only,
        "checkpoint.load_only is true",
    ),
    _while(
        "parallelism.tensor_parallel_degree",
        1,
        "parallelism",
        "disable_loss_parallel",
        "enable_async_tensor_parallel",
    ),
    _while("optimizer.qk_clip", 0.0, "optimizer", "qk_clip_interval"),
    _while("debug.sdc_check_interval", 0, "debug", "sdc_check_action"),
    _while("parallelism.context_parallel_degree", 1, "parallelism", *_CONTEXT),
    _while("parallelism.pipeline_parallel_degree", 1, "parallelism", "module_fqns_per_model_part", *_PIPELINE),
    Idle(
        "parallelism",
        tuple(name for name in _PIPELINE if "layers" in name),
        lambda recipe: (
            recipe.parallelism.pipeline_parallel_degree > 1
            and recipe.parallelism.module_fqns_per_model_part is not None
        ),
        "parallelism.module_fqns_per_model_part says which modules each part has",
    ),
    Idle(
        "activation_checkpoint",
        ("early_stop", "preserve_rng_state", "determinism_check", "debug"),
        lambda recipe: recipe.activation_checkpoint.mode not in ("selective", "full"),
        'activation_checkpoint.mode is neither "selective" nor "full"',
    ),
    _unless_mode("selective", "selective_ac_option"),
    Idle(
        "activation_checkpoint",
        ("per_op_sac_force_recompute_mm_shapes_by_fqns",),
        lambda recipe: not recipe.activation_checkpoint.per_op,
        'activation_checkpoint.mode is not "selective" with selective_ac_option = "op"',
    ),
    _unless_mode("memory_budget", "memory_budget", "visualize_memory_budget_pareto"),
    _while("stability.spike", "ignore", "stability", "spike_sigmas", "spike_window"),
    Idle(
        "stability",
        ("max_events",),
        lambda recipe: not recipe.stability.acts,
        "stability.nonfinite and stability.spike neither skip nor roll back",
    ),
    Idle(
        "averages",
        ("ema_decay",),
        lambda recipe: not (recipe.checkpoint.enable or recipe.validation.enable),
        "nothing is saved and nothing validated",
    ),
    _while("optimizer.weight_decay", 0, "optimizer", "weight_decay_on"),
    _while("data.on_bad_row", "stop", "data", "max_bad_rows"),
    _while("compile.enable", False, "compile", "components", "backend"),
    Idle("model", ("print_after_conversion",), lambda recipe: not recipe.model.converters, "model.converters is empty"),
    Idle(
        FLOAT8,
        tuple(Float8Config.model_fields),
        lambda recipe: not recipe.model.uses_float8,
        f"model.converters does not name {FLOAT8}",
    ),
)


def warn_without_effect(recipe: Recipe, found: Findings) -> None:
    """Warns of every key that is not at its default and does nothing."""
    defaults = Recipe()
    for idle in IDLE:
        if idle.when(recipe):
            for key in (f"{idle.table}.{name}" for name in idle.keys):
                if _value(recipe, key) != _value(defaults, key):
                    found.warn(key, f"has no effect because {idle.reason}")


def _value(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)
