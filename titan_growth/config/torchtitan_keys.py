"""Keys of torchtitan 0.2.2 that are not part of the schema (yet), so that none of them is ever dropped silently.

A recipe written for torchtitan may spell out settings that have no counterpart here. One that only says what happens
here anyway (its neutral value) is accepted; any other value is refused by name. `IGNORED` holds keys that can only
matter together with a feature that is switched off; they are accepted with a warning.
"""

from __future__ import annotations

NEUTRAL: dict[str, tuple[object, ...]] = {
    "job.custom_config_module": ("",),
    "optimizer.early_step_in_backward": (False,),
    "training.gc_debug": (False,),
    "parallelism.expert_parallel_degree": (1,),
    "parallelism.expert_tensor_parallel_degree": (1,),
    "checkpoint.enable_ft_dataloader_checkpoints": (True,),
    "checkpoint.initial_load_in_hf": (False,),
    "checkpoint.initial_load_in_hf_quantized": (False,),
    "checkpoint.last_save_in_hf": (False,),
    "checkpoint.export_dtype": ("float32",),
    "checkpoint.async_mode": ("disabled",),
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
"""Dotted key (or section.*) -> why it has no effect."""


def ignored_because(key: str) -> str | None:
    """Why a key that is not in the schema has no effect, or None when it is not such a key."""
    return IGNORED.get(key) or IGNORED.get(key.split(".")[0] + ".*")
