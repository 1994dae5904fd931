"""Checks of several keys together that need neither a device nor a mesh.

Settings of a feature that is off are not checked; `no_effect.py` warns of them.
"""

from __future__ import annotations

from titan_growth.config.no_effect import FLOAT8, warn_without_effect
from titan_growth.config.schema.growth import GrowthBase
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.schema.schedules import LENGTHS, LRSchedulerConfig
from titan_growth.tools.errors import LocationError
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import is_remote, location

_TAKEN = ("", ".", "..", "recipe.toml", "metrics.jsonl", "layers.jsonl", "exit.json")
"""File names in the run folder that no key may name."""


def check_recipe(recipe: Recipe, found: Findings) -> None:
    """Reports contradictions between keys of one recipe."""
    if not recipe.job.dump_folder.strip():
        found.problem("job.dump_folder", "must name a folder, is empty", "For example: ./outputs")
    name = recipe.job.save_config_file
    if name is not None and (name in _TAKEN or "/" in name):
        message = f"must be a file name of its own, got '{name}'"
        found.problem("job.save_config_file", message, "For example: config.json")
    _training(recipe, found)
    _validation(recipe, found)
    _urls(recipe, found)
    _checkpoint(recipe, found)
    _growth(recipe, found)
    _stability(recipe, found)
    _parallelism(recipe, found)
    _compile(recipe, found)
    _float8(recipe, found)
    warn_without_effect(recipe, found)
    profiling = recipe.profiling
    needed = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < needed:
        message = f"{profiling.profile_freq} is less than warmup + active = {needed}"
        found.problem("profiling.profile_freq", message, f"Set it to {needed} or more, or lower the other two")


def _training(recipe: Recipe, found: Findings) -> None:
    training, loader = recipe.training, recipe.training.dataloader
    batch, local = training.global_batch_size, training.local_batch_size
    if batch == 0:
        found.problem("training.global_batch_size", "must be -1 (derive it) or at least 1, got 0")
    elif batch > 0 and batch % local:
        message = f"{batch} is not a multiple of training.local_batch_size {local}"
        found.problem("training.global_batch_size", message)
    if loader.num_workers == 0:
        for key in ("persistent_workers", "prefetch_factor"):
            if getattr(loader, key):
                found.problem(f"training.dataloader.{key}", "needs training.dataloader.num_workers of at least 1")
    if loader.persistent_workers:
        message = "has no effect: the order of samples has no end, so workers live as long as the run in any case"
        found.warn("training.dataloader.persistent_workers", message)
    if training.dtype == "bfloat16" and training.mixed_precision_param == "float32":
        hint = "Parameters that are kept in bfloat16 are computed with in bfloat16"
        found.problem("training.mixed_precision_param", "float32 conflicts with training.dtype = bfloat16", hint)
    if recipe.data.tokenizer == "bytes" and recipe.data.tokenizer_path is not None:
        found.problem("data.tokenizer_path", "conflicts with data.tokenizer = 'bytes', which has no file")
    _lr_scheduler(recipe.lr_scheduler, training.steps, found)


def _lr_scheduler(section: LRSchedulerConfig, steps: int, found: Findings) -> None:
    total = section.total_steps
    if total is not None and total < steps:
        message = f"{total} is less than training.steps = {steps}; the rest runs at the floor"
        found.warn("lr_scheduler.total_steps", message)
    for key, other in LENGTHS.items():
        if getattr(section, key) is not None and other in section.model_fields_set:
            value = getattr(section, other)
            if value is not None:
                message = f"conflicts with lr_scheduler.{other} = {value}"
                found.problem(f"lr_scheduler.{key}", message, "Give one of the two")


def _validation(recipe: Recipe, found: Findings) -> None:
    validation = recipe.validation
    if validation.steps == 0:
        found.problem("validation.steps", "must be -1 (the whole set) or at least 1, got 0")
    has_corpus = validation.dataset is not None or validation.dataset_path is not None
    if validation.enable and not has_corpus and recipe.data.validation_fraction == 0:
        message = "0 holds nothing out, but validation.enable is true"
        hint = "Raise it, or name another corpus in validation.dataset_path"
        found.problem("data.validation_fraction", message, hint)


def _urls(recipe: Recipe, found: Findings) -> None:
    """URLs that cannot work, as far as that shows without asking any storage."""
    data, validation, checkpoint = recipe.data, recipe.validation, recipe.checkpoint
    places = {
        "training.dataset_path": recipe.training.dataset_path,
        "validation.dataset_path": validation.dataset_path if validation.enable else None,
        "data.tokenizer_path": data.tokenizer_path,
        "checkpoint.folder": checkpoint.folder if checkpoint.enable else None,
        "checkpoint.initial_load_path": checkpoint.initial_load_path if checkpoint.enable else None,
        "model.hf_assets_path": recipe.model.hf_assets_path if data.tokenizer_path is None else None,
    }
    for key, place in places.items():
        if place == "" and key.endswith("dataset_path"):
            message = "is empty, which would be the folder that the run is started in"
            found.problem(key, message, 'Name a path or URL ("." is that folder), or leave the key out')
        try:
            location(place or "")
        except LocationError as error:
            found.problem(key, error.message, error.hint)
    if data.cache_dir is not None and is_remote(data.cache_dir):
        message = f"{data.cache_dir} is a URL, but prepared data is memory-mapped from a disk"
        found.problem("data.cache_dir", message, "Name a folder; corpora and tokenizers may be URLs")


def _checkpoint(recipe: Recipe, found: Findings) -> None:
    checkpoint = recipe.checkpoint
    if checkpoint.keep_latest_k == 1:
        hint = "One copy alone can be lost while saving"
        found.problem("checkpoint.keep_latest_k", "must be 0 (all) or at least 2, got 1", hint)
    if checkpoint.enable and checkpoint.initial_load_in_hf and checkpoint.initial_load_path is None:
        message = "true needs checkpoint.initial_load_path; torchtitan would take model.hf_assets_path"
        found.problem("checkpoint.initial_load_in_hf", message, "Name the Hugging Face folder there")
    if checkpoint.start_fresh and (checkpoint.load_step != -1 or checkpoint.load_only):
        other = "load_only is true" if checkpoint.load_only else f"load_step is {checkpoint.load_step}"
        message = f"true starts from scratch, but checkpoint.{other}"
        found.problem("checkpoint.start_fresh", message, "Leave one of the two out")
    leaves = checkpoint.folder.startswith("/") or ".." in checkpoint.folder.split("/")
    if not is_remote(checkpoint.folder) and (leaves or not checkpoint.folder):
        message = f"must name a folder inside job.dump_folder, or be a URL, got '{checkpoint.folder}'"
        found.problem("checkpoint.folder", message)


def _parallelism(recipe: Recipe, found: Findings) -> None:
    parallelism, batch = recipe.parallelism, recipe.training.local_batch_size
    microbatch = parallelism.pipeline_parallel_microbatch_size
    if parallelism.pipeline_parallel_degree > 1 and batch % microbatch:
        message = f"{microbatch} does not divide training.local_batch_size {batch}"
        hint = "A pipeline takes the local batch in equal microbatches"
        found.problem("parallelism.pipeline_parallel_microbatch_size", message, hint)
    if parallelism.tensor_parallel_degree > 1 and parallelism.enable_async_tensor_parallel:
        key = "parallelism.enable_async_tensor_parallel"
        if not recipe.compile.compiles_model:
            found.problem(key, f"needs {_MODEL_COMPILED}")
        elif recipe.compile.backend != "inductor":
            found.problem(key, f"needs compile.backend = 'inductor', got '{recipe.compile.backend}'")


_MODEL_COMPILED = 'compile.enable = true with "model" in compile.components'


def _compile(recipe: Recipe, found: Findings) -> None:
    components = recipe.compile.components
    if recipe.compile.enable and not components:
        hint = 'Name "model", "loss" or both, or set compile.enable = false'
        found.problem("compile.components", "is empty, but compile.enable is true", hint)
    if recipe.compile.enable and "loss" in components and recipe.training.loss_chunk_tokens:
        message = '"loss" has no effect because training.loss_chunk_tokens computes the loss in pieces, uncompiled'
        found.warn("compile.components", message)
    if recipe.activation_checkpoint.mode == "memory_budget" and not recipe.compile.compiles_model:
        message = f"'memory_budget' leaves the choice to the compiler, so it needs {_MODEL_COMPILED}"
        found.problem("activation_checkpoint.mode", message, "Compile the model, or choose 'selective' or 'full'")


def _float8(recipe: Recipe, found: Findings) -> None:
    """Gathering parameters in Float8 needs one scale per tensor, agreed on before."""
    float8 = recipe.quantize.linear.float8
    if not recipe.model.uses_float8:
        return
    gathers, precomputes = "enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp"
    if float8.recipe_name not in (None, "tensorwise"):
        for name in (gathers, precomputes):
            if getattr(float8, name):
                message = f"needs {FLOAT8}.recipe_name = 'tensorwise', got '{float8.recipe_name}'"
                found.problem(f"{FLOAT8}.{name}", message)
    elif float8.precompute_float8_dynamic_scale_for_fsdp and not float8.enable_fsdp_float8_all_gather:
        found.problem(f"{FLOAT8}.{precomputes}", f"needs {FLOAT8}.{gathers} = true, whose scales it computes")


def _stability(recipe: Recipe, found: Findings) -> None:
    checkpoint = recipe.checkpoint
    if recipe.comm.mode != "default" or (checkpoint.enable and not checkpoint.load_only):
        return  # a dry run takes one step
    reason = "checkpoint.load_only is true" if checkpoint.enable else "checkpoint.enable is false"
    for key in recipe.stability.rolls_back:
        message = f"'roll_back' goes on from the last checkpoint, but {reason}"
        found.problem(f"stability.{key}", message, "Save checkpoints, or choose 'skip'")


def _growth(recipe: Recipe, found: Findings) -> None:
    """The order of the growths; `growth.schedule` checks what depends on the model."""
    if recipe.comm.mode != "default":
        return  # a dry run does not grow
    if not recipe.growth.active_stages:
        base = recipe.growth.base
        if recipe.growth.enable and base != GrowthBase():
            found.warn("growth.base", "has no effect because there are no [[growth.stages]]")
        return
    checkpoint, steps = recipe.checkpoint, recipe.training.steps
    if not checkpoint.enable:
        message = "growing needs checkpoints: the grown model is read from the one saved at the growth"
        found.problem("growth.enable", message, "Set checkpoint.enable = true, or growth.enable = false")
    elif checkpoint.load_only:
        message = "conflicts with growth, which saves a checkpoint"
        found.problem("checkpoint.load_only", message, "Set growth.enable = false")
    previous = 0
    for index, planned in enumerate(recipe.growth.active_stages):
        key = f"growth.stages.{index}.at"
        if planned.lr_policy == "continue" and planned.own_warmup is not None:
            found.warn(f"growth.stages.{index}.{planned.warmup_key}", 'has no effect because lr_policy is "continue"')
        when = planned.when
        if when.unit != "steps":
            continue  # its step depends on the batch size and the run: see growth.schedule
        if when.count >= steps:
            message = f'"{planned.at}" is not before the last step (training.steps = {steps:,})'
            hint = "Grow earlier or train longer; growth.enable = false trains the target model from scratch"
            found.problem(key, message, hint)
        if when.count <= previous:
            message = f'"{planned.at}" is not after the growth before it'
            found.problem(key, message, "Stages are in the order they happen")
        previous = when.count
