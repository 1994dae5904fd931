"""Settings that were changed although what they belong to is switched off.

Such a recipe is not wrong, but whoever wrote it may think that it does something that it does not. So each key whose
value is not the default's gets a warning with the reason. One table says which key belongs to what.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.findings import Findings

FLOAT8 = "quantize.linear.float8"


class Idle(NamedTuple):
    """Keys of one table that do nothing while a condition holds."""

    table: str
    keys: tuple[str, ...]
    when: Callable[[Recipe], bool]
    reason: str


IDLE = (
    Idle(
        "checkpoint",
        (
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
        lambda recipe: not recipe.checkpoint.enable,
        "checkpoint.enable is false",
    ),
    Idle(
        "checkpoint",
        ("async_mode", "permanent_interval", "save_retries"),
        lambda recipe: recipe.checkpoint.enable and recipe.checkpoint.load_only,
        "checkpoint.load_only is true",
    ),
    Idle(
        "parallelism",
        ("disable_loss_parallel", "enable_async_tensor_parallel"),
        lambda recipe: recipe.parallelism.tensor_parallel_degree == 1,
        "parallelism.tensor_parallel_degree is 1",
    ),
    Idle(
        "parallelism",
        ("context_parallel_load_balancer", "context_parallel_rotate_method"),
        lambda recipe: recipe.parallelism.context_parallel_degree == 1,
        "parallelism.context_parallel_degree is 1",
    ),
    Idle(
        "parallelism",
        (
            "module_fqns_per_model_part",
            "pipeline_parallel_first_stage_less_layers",
            "pipeline_parallel_last_stage_less_layers",
            "pipeline_parallel_layers_per_stage",
            "pipeline_parallel_schedule",
            "pipeline_parallel_schedule_csv",
            "pipeline_parallel_microbatch_size",
        ),
        lambda recipe: recipe.parallelism.pipeline_parallel_degree == 1,
        "parallelism.pipeline_parallel_degree is 1",
    ),
    Idle(
        "parallelism",
        (
            "pipeline_parallel_first_stage_less_layers",
            "pipeline_parallel_last_stage_less_layers",
            "pipeline_parallel_layers_per_stage",
        ),
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
    Idle(
        "activation_checkpoint",
        ("selective_ac_option",),
        lambda recipe: recipe.activation_checkpoint.mode != "selective",
        'activation_checkpoint.mode is not "selective"',
    ),
    Idle(
        "activation_checkpoint",
        ("per_op_sac_force_recompute_mm_shapes_by_fqns",),
        lambda recipe: not recipe.activation_checkpoint.per_op,
        'activation_checkpoint.mode is not "selective" with selective_ac_option = "op"',
    ),
    Idle(
        "activation_checkpoint",
        ("memory_budget", "visualize_memory_budget_pareto"),
        lambda recipe: recipe.activation_checkpoint.mode != "memory_budget",
        'activation_checkpoint.mode is not "memory_budget"',
    ),
    Idle(
        "stability",
        ("spike_sigmas", "spike_window"),
        lambda recipe: recipe.stability.spike == "ignore",
        'stability.spike is "ignore"',
    ),
    Idle(
        "stability",
        ("max_events",),
        lambda recipe: not recipe.stability.acts,
        "stability.nonfinite and stability.spike neither skip nor roll back",
    ),
    Idle("compile", ("components", "backend"), lambda recipe: not recipe.compile.enable, "compile.enable is false"),
    Idle("model", ("print_after_conversion",), lambda recipe: not recipe.model.converters, "model.converters is empty"),
    Idle(
        FLOAT8,
        (
            "enable_fsdp_float8_all_gather",
            "precompute_float8_dynamic_scale_for_fsdp",
            "recipe_name",
            "filter_fqns",
            "emulate",
        ),
        lambda recipe: FLOAT8 not in recipe.model.converters,
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
