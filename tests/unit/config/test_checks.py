"""Checks between keys of one recipe, and the durations that growths are given in."""

from __future__ import annotations

from decimal import Decimal
from functools import reduce
from typing import Any

import pytest

from tests.runs import argv_of
from titan_growth.config.duration import Duration
from titan_growth.config.fields import leaves
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.no_effect import IDLE
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.findings import Findings

GROWING = {"checkpoint.enable": True, "training.steps": 100, "growth.stages.0.factor": 2}
TWICE = {**GROWING, "growth.stages.0.at": "10 steps", "growth.stages.1.factor": 2}
TOKENS = {**GROWING, "training.global_batch_size": 8, "training.seq_len": 10}

OFF = {"activation_checkpoint.mode": "none"}
PIPELINE = {"parallelism.pipeline_parallel_degree": 2}
PARTS = {**PIPELINE, "parallelism.module_fqns_per_model_part": [["tok_embeddings"], ["layers.0", "norm", "output"]]}
ASYNC = {"parallelism.tensor_parallel_degree": 2, "parallelism.enable_async_tensor_parallel": True}
BUDGET = {"activation_checkpoint.mode": "memory_budget"}
FLOAT8 = {"model.converters": "quantize.linear.float8"}
GATHER = "quantize.linear.float8.enable_fsdp_float8_all_gather"
PRECOMPUTE = "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
RECIPE = "quantize.linear.float8.recipe_name"

REFUSED = [
    ({"training.dataset_path": ""}, "training.dataset_path", "is empty, which would be the folder that the run is"),
    (
        {"validation.enable": True, "validation.dataset_path": ""},
        "validation.dataset_path",
        "is empty, which would be the folder that the run is started in",
    ),
    (
        {"profiling.enable_profiling": True, "profiling.profile_freq": 3},
        "profiling.profile_freq",
        "warmup + active = 4",
    ),
    ({"training.global_batch_size": 0}, "training.global_batch_size", "must be -1 (derive it) or at least 1"),
    ({"training.global_batch_size": 12}, "training.global_batch_size", "12 is not a multiple of"),
    ({"training.dataloader.persistent_workers": True}, "training.dataloader.persistent_workers", "needs"),
    ({"training.dataloader.prefetch_factor": 2}, "training.dataloader.prefetch_factor", "needs"),
    (
        {"training.dtype": "bfloat16", "training.mixed_precision_param": "float32"},
        "training.mixed_precision_param",
        "conflicts with training.dtype",
    ),
    ({"data.tokenizer": "bytes", "data.tokenizer_path": "x"}, "data.tokenizer_path", "conflicts"),
    ({"validation.steps": 0}, "validation.steps", "must be -1"),
    ({"validation.enable": True, "data.validation_fraction": 0.0}, "data.validation_fraction", "holds nothing out"),
    ({"checkpoint.keep_latest_k": 1}, "checkpoint.keep_latest_k", "0 (all) or at least 2"),
    ({"checkpoint.folder": ""}, "checkpoint.folder", "inside job.dump_folder"),
    ({"checkpoint.folder": "/tmp/x"}, "checkpoint.folder", "inside job.dump_folder"),
    ({"checkpoint.folder": "a/../../x"}, "checkpoint.folder", "inside job.dump_folder"),
    ({**GROWING, "growth.stages.0.at": "1 step", "checkpoint.enable": False}, "growth.enable", "needs checkpoints"),
    ({**GROWING, "growth.stages.0.at": "1 step", "checkpoint.load_only": True}, "checkpoint.load_only", "conflicts"),
    ({"stability.nonfinite": "roll_back"}, "stability.nonfinite", "but checkpoint.enable is false"),
    (
        {"stability.spike": "roll_back", "checkpoint.enable": True, "checkpoint.load_only": True},
        "stability.spike",
        "'roll_back' goes on from the last checkpoint, but checkpoint.load_only is true",
    ),
    ({"stability.spike": "repeat"}, "stability.spike", "one of 'ignore', 'warn', 'skip', 'roll_back'"),
    ({"stability.spike_window": 4}, "stability.spike_window", "8"),
    ({"stability.spike_sigmas": 0}, "stability.spike_sigmas", "0"),
    ({"stability.max_events": 0}, "stability.max_events", "1"),
    ({"job.time_limit_seconds": 0}, "job.time_limit_seconds", "1"),
    ({**GROWING, "growth.stages.0.at": "100 steps"}, "growth.stages.0.at", "not before the last step"),
    ({**TWICE, "growth.stages.1.at": "10 steps"}, "growth.stages.1.at", "not after the growth before"),
    ({"job.save_config_file": "sub/config.json"}, "job.save_config_file", "file name of its own"),
    ({"job.save_config_file": "recipe.toml"}, "job.save_config_file", "file name of its own"),
    (
        {**PIPELINE, "parallelism.pipeline_parallel_microbatch_size": 3},
        "parallelism.pipeline_parallel_microbatch_size",
        "3 does not divide training.local_batch_size 8",
    ),
    (
        {**PIPELINE, "parallelism.pipeline_parallel_microbatch_size": 16},
        "parallelism.pipeline_parallel_microbatch_size",
        "16 does not divide training.local_batch_size 8",
    ),
    (ASYNC, "parallelism.enable_async_tensor_parallel", 'needs compile.enable = true with "model" in'),
    (
        {**ASYNC, "compile.enable": True, "compile.components": "loss"},
        "parallelism.enable_async_tensor_parallel",
        'needs compile.enable = true with "model" in',
    ),
    (
        {**ASYNC, "compile.enable": True, "compile.backend": "aot_eager"},
        "parallelism.enable_async_tensor_parallel",
        "needs compile.backend = 'inductor', got 'aot_eager'",
    ),
    ({"compile.enable": True, "compile.components": "[]"}, "compile.components", "is empty, but compile.enable is"),
    (BUDGET, "activation_checkpoint.mode", 'so it needs compile.enable = true with "model" in compile.components'),
    ({**BUDGET, "compile.enable": True, "compile.components": "loss"}, "activation_checkpoint.mode", "so it needs"),
    ({**FLOAT8, PRECOMPUTE: True}, PRECOMPUTE, f"needs {GATHER} = true"),
    ({**FLOAT8, PRECOMPUTE: True, RECIPE: "tensorwise"}, PRECOMPUTE, f"needs {GATHER} = true"),
    ({**FLOAT8, PRECOMPUTE: True, RECIPE: "rowwise"}, PRECOMPUTE, f"needs {RECIPE} = 'tensorwise', got 'rowwise'"),
    ({**FLOAT8, GATHER: True, RECIPE: "rowwise"}, GATHER, f"needs {RECIPE} = 'tensorwise', got 'rowwise'"),
    ({**FLOAT8, GATHER: True, RECIPE: "rowwise_with_gw_hp"}, GATHER, "'tensorwise', got 'rowwise_with_gw_hp'"),
]
ACCEPTED = [
    {"profiling.enable_profiling": True, "profiling.profile_freq": 4},
    {"profiling.profile_freq": 3},
    {"training.global_batch_size": 16},
    {"training.dataloader.num_workers": 1, "training.dataloader.prefetch_factor": 2},
    {"training.dtype": "bfloat16"},
    {"validation.enable": True, "data.validation_fraction": 0.0, "validation.dataset_path": "x"},
    {"data.validation_fraction": 0.0},
    {"checkpoint.keep_latest_k": 0},
    {"checkpoint.keep_latest_k": 2},
    {**GROWING, "growth.stages.0.at": "99 steps"},
    {**TOKENS, "growth.stages.0.at": "7920 tokens"},
    {**GROWING, "growth.stages.0.at": "100 steps", "growth.enable": False, "checkpoint.enable": False},
    {**GROWING, "growth.stages.0.at": "100 steps", "comm.mode": "fake_backend"},
    {**TWICE, "growth.stages.1.at": "11 steps"},
    {**TWICE, **TOKENS, "growth.stages.1.at": "801 tokens"},
    {**PIPELINE, "parallelism.pipeline_parallel_microbatch_size": 4},
    {
        **PIPELINE,
        "parallelism.pipeline_parallel_schedule": "GPipe",
        "parallelism.pipeline_parallel_layers_per_stage": 1,
    },
    PARTS,
    {**ASYNC, "compile.enable": True},
    {"parallelism.tensor_parallel_degree": 2, "parallelism.disable_loss_parallel": True},
    {"parallelism.context_parallel_degree": 2, "parallelism.context_parallel_load_balancer": "none"},
    {"optimizer.qk_clip": 100.0, "optimizer.qk_clip_interval": 10},
    {"debug.sdc_check_interval": 5, "debug.sdc_check_action": "warn"},
    {**BUDGET, "compile.enable": True, "activation_checkpoint.memory_budget": 0.3},
    {"activation_checkpoint.mode": "full", "activation_checkpoint.preserve_rng_state": False},
    {"activation_checkpoint.selective_ac_option": "op"},
    {
        "activation_checkpoint.selective_ac_option": "op",
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "output",
    },
    {"compile.enable": True, "compile.components": "model", "training.loss_chunk_tokens": 512},
    {"training.loss_chunk_tokens": 512},
    {**FLOAT8, GATHER: True, PRECOMPUTE: True},
    {**FLOAT8, GATHER: True, PRECOMPUTE: True, RECIPE: "tensorwise"},
    {**FLOAT8, RECIPE: "rowwise", "quantize.linear.float8.emulate": True, "model.print_after_conversion": True},
]
LOADING: dict[str, object] = {"checkpoint.enable": True, "checkpoint.load_only": True}
WITHOUT_EFFECT: list[tuple[dict[str, object], str, object, str]] = [
    ({}, "checkpoint.enable_first_step_checkpoint", True, "checkpoint.enable is false"),
    ({}, "checkpoint.last_save_model_only", True, "checkpoint.enable is false"),
    ({}, "checkpoint.async_mode", "async", "checkpoint.enable is false"),
    ({}, "averages.ema_decay", 0.999, "nothing is saved and nothing validated"),
    ({}, "checkpoint.permanent_interval", 5, "checkpoint.enable is false"),
    (LOADING, "checkpoint.async_mode", "async", "checkpoint.load_only is true"),
    (LOADING, "checkpoint.save_retries", 5, "checkpoint.load_only is true"),
    ({}, "stability.spike_sigmas", 5.0, 'stability.spike is "ignore"'),
    ({}, "stability.spike_window", 64, 'stability.spike is "ignore"'),
    ({}, "stability.max_events", 3, "stability.nonfinite and stability.spike neither skip nor roll back"),
    ({"stability.spike": "warn"}, "stability.max_events", 3, "neither skip nor roll back"),
    ({}, "parallelism.pipeline_parallel_schedule", "GPipe", "parallelism.pipeline_parallel_degree is 1"),
    ({}, "parallelism.pipeline_parallel_schedule_csv", "x", "parallelism.pipeline_parallel_degree is 1"),
    ({}, "parallelism.pipeline_parallel_microbatch_size", 3, "parallelism.pipeline_parallel_degree is 1"),
    ({}, "parallelism.pipeline_parallel_layers_per_stage", 2, "parallelism.pipeline_parallel_degree is 1"),
    ({}, "parallelism.pipeline_parallel_first_stage_less_layers", 0, "parallelism.pipeline_parallel_degree is 1"),
    ({}, "parallelism.pipeline_parallel_last_stage_less_layers", 2, "parallelism.pipeline_parallel_degree is 1"),
    ({}, "parallelism.module_fqns_per_model_part", [["output"]], "parallelism.pipeline_parallel_degree is 1"),
    (PARTS, "parallelism.pipeline_parallel_layers_per_stage", 2, "parallelism.module_fqns_per_model_part says"),
    (PARTS, "parallelism.pipeline_parallel_first_stage_less_layers", 0, "parallelism.module_fqns_per_model_part says"),
    (PARTS, "parallelism.pipeline_parallel_last_stage_less_layers", 0, "parallelism.module_fqns_per_model_part says"),
    ({}, "parallelism.disable_loss_parallel", True, "parallelism.tensor_parallel_degree is 1"),
    ({}, "parallelism.enable_async_tensor_parallel", True, "parallelism.tensor_parallel_degree is 1"),
    ({}, "optimizer.qk_clip_interval", 10, "optimizer.qk_clip is 0.0"),
    ({}, "debug.sdc_check_action", "warn", "debug.sdc_check_interval is 0"),
    ({}, "parallelism.context_parallel_load_balancer", "none", "parallelism.context_parallel_degree is 1"),
    ({}, "parallelism.context_parallel_rotate_method", "alltoall", "parallelism.context_parallel_degree is 1"),
    (OFF, "activation_checkpoint.selective_ac_option", "op", 'activation_checkpoint.mode is not "selective"'),
    (OFF, "activation_checkpoint.early_stop", True, 'activation_checkpoint.mode is neither "selective" nor "full"'),
    (OFF, "activation_checkpoint.preserve_rng_state", False, 'mode is neither "selective" nor "full"'),
    (OFF, "activation_checkpoint.determinism_check", "none", 'mode is neither "selective" nor "full"'),
    (OFF, "activation_checkpoint.debug", True, 'activation_checkpoint.mode is neither "selective" nor "full"'),
    ({}, "activation_checkpoint.memory_budget", 0.2, 'activation_checkpoint.mode is not "memory_budget"'),
    ({}, "activation_checkpoint.visualize_memory_budget_pareto", True, 'mode is not "memory_budget"'),
    (
        {},
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns",
        ["output"],
        'activation_checkpoint.mode is not "selective" with selective_ac_option = "op"',
    ),
    ({"optimizer.weight_decay": 0.0}, "optimizer.weight_decay_on", "matrices", "optimizer.weight_decay is 0"),
    ({}, "data.max_bad_rows", 5, 'data.on_bad_row is "stop"'),
    ({}, "compile.components", ["loss"], "compile.enable is false"),
    ({}, "compile.backend", "aot_eager", "compile.enable is false"),
    ({}, "model.print_after_conversion", True, "model.converters is empty"),
    ({}, GATHER, True, "model.converters does not name quantize.linear.float8"),
    ({}, PRECOMPUTE, True, "model.converters does not name quantize.linear.float8"),
    ({}, RECIPE, "rowwise", "model.converters does not name quantize.linear.float8"),
    ({}, "quantize.linear.float8.filter_fqns", ["output"], "model.converters does not name quantize.linear.float8"),
    ({}, "quantize.linear.float8.emulate", True, "model.converters does not name quantize.linear.float8"),
    (
        {"compile.enable": True, "training.loss_chunk_tokens": 512},
        "compile.components",
        ["model", "loss"],
        "training.loss_chunk_tokens computes the loss in pieces",
    ),
]
WARNED = [
    ({"checkpoint.load_only": True}, "checkpoint.load_only"),
    ({"checkpoint.initial_load_path": "x"}, "checkpoint.initial_load_path"),
    ({"checkpoint.initial_load_in_hf": True}, "checkpoint.initial_load_in_hf"),
    ({"checkpoint.load_step": 3}, "checkpoint.load_step"),
    ({"lr_scheduler.total_steps": 9, "training.steps": 10}, "lr_scheduler.total_steps"),
    ({"growth.base.lr": 1e-3}, "growth.base"),
    ({"growth.base.rope_theta": 1e4}, "growth.base"),
    ({"growth.base.n_layers": 3}, "growth.base"),
    (
        {
            **GROWING,
            "growth.stages.0.at": "1 step",
            "growth.stages.0.lr_policy": "continue",
            "growth.stages.0.warmup_steps": 3,
        },
        "growth.stages.0.warmup_steps",
    ),
]


@pytest.mark.parametrize(("values", "key", "message"), REFUSED, ids=[str(list(case[0].items())) for case in REFUSED])
def test_refused(values: dict[str, object], key: str, message: str) -> None:
    inspect_recipe(argv_of(values), found := Findings())
    assert [problem.key for problem in found.problems] == [key]
    assert message in found.problems[0].message


@pytest.mark.parametrize("values", ACCEPTED, ids=[str(list(case.items())) for case in ACCEPTED])
def test_accepted(values: dict[str, object]) -> None:
    inspect_recipe(argv_of(values), found := Findings())
    assert [str(problem) for problem in found.problems + found.warnings] == []


@pytest.mark.parametrize(("values", "key"), WARNED, ids=[case[1] for case in WARNED])
def test_allowed_but_without_effect(values: dict[str, object], key: str) -> None:
    inspect_recipe(argv_of(values), found := Findings())
    assert not found.problems
    assert [warning.key for warning in found.warnings] == [key]


@pytest.mark.parametrize(
    ("around", "key", "value", "reason"), WITHOUT_EFFECT, ids=[f"{case[1]}-{len(case[0])}" for case in WITHOUT_EFFECT]
)
def test_a_setting_of_what_is_off(around: dict[str, object], key: str, value: object, reason: str) -> None:
    inspect_recipe(argv_of({**around, key: value}), found := Findings())
    assert not found.problems
    assert [warning.key for warning in found.warnings] == [key]
    assert "has no effect because " in found.warnings[0].message
    assert reason in found.warnings[0].message
    assert found.warnings[0].message.endswith(f" (--{key})")


def test_defaults_that_are_spelled_out_are_not_warned_about() -> None:
    """Also those that cannot do anything: recipes of torchtitan spell out whole tables."""
    values = {f"{idle.table}.{name}": None for idle in IDLE for name in idle.keys}
    for key in values:
        values[key] = reduce(getattr, key.split("."), Recipe())
    inspect_recipe(argv_of({key: "none" if v is None else v for key, v in values.items()}), found := Findings())
    assert [str(problem) for problem in found.problems + found.warnings] == []


def test_every_key_in_the_table_exists_and_is_tried() -> None:
    keys = [f"{idle.table}.{name}" for idle in IDLE for name in idle.keys]
    assert set(keys) <= dict(leaves(Recipe)).keys()
    tried = {key for _, key, _, _ in WITHOUT_EFFECT} | {key for _, key in WARNED}
    assert set(keys) <= tried


@pytest.mark.parametrize(
    "refused",
    [
        {"parallelism.pipeline_parallel_degree": "two", "parallelism.pipeline_parallel_microbatch_size": 3},
        {**BUDGET, "compile.enable": "yes"},
        {**ASYNC, "compile.enable": "yes"},
        {**FLOAT8, PRECOMPUTE: True, GATHER: "yes"},
        {**FLOAT8, GATHER: True, RECIPE: "tensor"},
    ],
    ids=str,
)
def test_what_was_refused_is_not_held_against_other_keys(refused: dict[str, object]) -> None:
    inspect_recipe(argv_of(refused), found := Findings())
    assert len(found.problems) == 1, [str(problem) for problem in found.problems]


@pytest.mark.parametrize(
    ("text", "value", "unit", "shown"),
    [
        ("300 steps", 300, "steps", "300 steps"),
        ("1 step", 1, "steps", "1 step"),
        ("300 tokens", 300, "tokens", "300 tokens"),
        ("1 token", 1, "tokens", "1 token"),
        ("3T tokens", 3 * 10**12, "tokens", "3,000,000,000,000 tokens"),
        ("3t tokens", 3 * 10**12, "tokens", "3,000,000,000,000 tokens"),
        (" 10M  Tokens ", 10**7, "tokens", "10,000,000 tokens"),
        ("10Mtokens", 10**7, "tokens", "10,000,000 tokens"),
        ("1.5B tokens", 1_500_000_000, "tokens", "1,500,000,000 tokens"),
        ("1.001k steps", 1001, "steps", "1,001 steps"),
        ("1_000 steps", 1000, "steps", "1,000 steps"),
        ("1,000 steps", 1000, "steps", "1,000 steps"),
        ("1e3 steps", 1000, "steps", "1,000 steps"),
        ("3.5e21 FLOPs", 35 * 10**20, "FLOPs", "3.5e21 FLOPs"),
        ("12 flops", 12, "FLOPs", "12 FLOPs"),
        ("25%", 25, "percent", "25%"),
        ("2.5 % of the run", Decimal("2.5"), "percent", "2.5%"),
        ("auto", 0, "auto", "auto"),
        ("Slope 0.02 over 200 steps", Decimal("0.02"), "slope", "slope 0.02 over 200 steps"),
        ("9007199254740993 tokens", 2**53 + 1, "tokens", "9,007,199,254,740,993 tokens"),
    ],
)
def test_duration(text: str, value: Any, unit: str, shown: str) -> None:
    duration = Duration.parse(text)
    assert (duration.value, duration.unit, str(duration)) == (value, unit, shown)
    assert Duration.parse(str(duration)) == duration


def test_every_thousandth_is_exact() -> None:
    for steps in range(1000, 10_000):
        assert Duration.parse(f"{steps // 1000}.{steps % 1000:03}k steps").value == steps


@pytest.mark.parametrize(
    "text",
    [
        "300",
        "",
        "steps",
        "-3 steps",
        "0 steps",
        "0.5 steps",
        "1.0001k steps",
        "3 epochs",
        "3 t",
        "1e-3 steps",
        "100%",
        "slope 0.1",
        "auto 3",
    ],
)
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match='expected a count with a unit, such as "300 steps" or "10M tokens"'):
        Duration.parse(text)
