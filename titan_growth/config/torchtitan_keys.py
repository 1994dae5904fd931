"""Keys of torchtitan 0.2.2 that are not in the schema, so that none is dropped silently.

A neutral value asks for what happens here anyway and is accepted; any other is refused by name. Keys in `IGNORED` only
matter to features that are off, and are accepted with a warning.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from titan_growth.tools.findings import Findings

NEUTRAL: dict[str, tuple[object, ...]] = {
    "job.custom_config_module": ("",),
    "optimizer.early_step_in_backward": (False,),
    "training.gc_debug": (False,),
    "parallelism.expert_parallel_degree": (1,),
    "parallelism.expert_tensor_parallel_degree": (1,),
    "checkpoint.enable_ft_dataloader_checkpoints": (True,),
    "checkpoint.initial_load_in_hf_quantized": (False,),
    "checkpoint.last_save_in_hf": (False,),
    "checkpoint.export_dtype": ("float32",),
    "checkpoint.exclude_from_loading": ([],),
    "checkpoint.create_seed_checkpoint": (False,),
    "memory_estimation.enable": (False,),
    "fault_tolerance.enable": (False,),
    "experimental.custom_import": ("",),
    "experimental.custom_args_module": ("",),
    "validation.dataloader.num_workers": (0,),
    "validation.dataloader.persistent_workers": (False,),
    "validation.dataloader.pin_memory": (False,),
    "debug.moe_force_load_balance": (False,),
}
"""Dotted key -> the values that change nothing."""

IGNORED: dict[str, str] = {
    "parallelism.pipeline_parallel_expert_parallel_overlap": "parallelism.pipeline_parallel_degree is 1",
    "parallelism.expert_parallel_comm_backend": "parallelism.expert_parallel_degree is 1",
    "validation.dataloader.prefetch_factor": "validation.dataloader.num_workers is 0",
    "quantize.linear.mx.*": "model.converters does not name it",
    "quantize.grouped_mm.*": "there are no grouped products in a dense model",
    "memory_estimation.*": "memory_estimation.enable is false",
    "fault_tolerance.*": "fault_tolerance.enable is false",
}
"""Dotted key, or table.* for everything in a table -> why it has no effect."""

OLDER_CONVERTERS = {"float8": "quantize.linear.float8"}
"""Older spellings in model.converters -> current ones; accepted with a warning."""

UNSUPPORTED_CONVERTERS = ("quantize.linear.mx", "quantize.grouped_mm.float8", "quantize.grouped_mm.mx")
"""Items of model.converters that exist in torchtitan only."""


def ignored_because(key: str) -> str | None:
    """Why a key that is not in the schema has no effect; None if it is not in `IGNORED`."""
    return next((reason for pattern, reason in IGNORED.items() if fnmatchcase(key, pattern)), None)


def holds_known_keys(table: str) -> bool:
    """Whether keys of this table are listed here."""
    listed = any(name.startswith(table + ".") for name in (*NEUTRAL, *IGNORED))
    return listed or ignored_because(table) is not None


def warn_of_older_spellings(values: dict[str, Any], found: Findings) -> None:
    """Warns of every older spelling among the values of a recipe, as given."""
    model = values.get("model")
    converters = model.get("converters") if isinstance(model, dict) else None
    for old, new in OLDER_CONVERTERS.items():
        if isinstance(converters, list) and old in converters:
            found.warn("model.converters", f"'{old}' is an older name of '{new}'", "Write the new one")
