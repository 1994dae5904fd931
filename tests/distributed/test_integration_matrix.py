"""torchtitan's integration tests, under their original names (v0.2.2, `tests/integration_tests`).

torchtitan only checks that a command ends with status 0. Here each run must also log every step, resume where it
should, and learn. `docs/generated/integration_matrix.md` lists them all, with what is left out and why; a test keeps it
complete.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import CSV
from tests.harness import WarmRanks
from tests.runs import argv_of, make_recipe, read_metrics, train
from titan_growth.checkpoint.folder import open_step
from titan_growth.config.loader import inspect_recipe
from titan_growth.run.plan import plan_run
from titan_growth.tools.findings import Findings

DOCUMENT = Path(__file__).parents[2] / "docs" / "generated" / "integration_matrix.md"

Settings = dict[str, Any]


@dataclass(frozen=True)
class Combination:
    """One or more runs in sequence."""

    num_ranks: int
    runs: tuple[Settings, ...]
    resumes: bool = False
    """The runs share one folder, and each resumes from the checkpoint of the one before."""
    leaves: tuple[str, ...] = ()
    """Patterns of files that must exist at the end."""


def once(num_ranks: int, *leaves: str, **settings: Any) -> Combination:
    return Combination(num_ranks, (settings,), leaves=leaves)


def resumed(num_ranks: int, first: Settings, then: Settings) -> Combination:
    """Two runs, the second to twice the steps."""
    return Combination(num_ranks, (first, {**then, "training__steps": 4}), resumes=True)


def degrees(pp: int = 1, replicate: int | None = None, shard: int | None = None, cp: int = 1, tp: int = 1) -> Settings:
    named = {
        "pipeline_parallel_degree": pp,
        "data_parallel_replicate_degree": replicate or 1,
        "data_parallel_shard_degree": shard or -1,
        "context_parallel_degree": cp,
        "tensor_parallel_degree": tp,
    }
    return {f"parallelism__{name}": degree for name, degree in named.items() if degree not in (1, -1)} | (
        {} if shard is None else {"parallelism__data_parallel_shard_degree": shard}
    )


BASE: Settings = {
    "model__n_layers": 4,
    "training__steps": 2,
    "training__local_batch_size": 4,
    "training__global_batch_size": -1,
    "training__mixed_precision_param": "bfloat16",
    "activation_checkpoint__mode": "selective",
    "lr_scheduler__warmup_steps": 0,
    "lr_scheduler__decay_ratio": 0.0,
}
COMPILE: Settings = {"compile__enable": True, "compile__backend": "aot_eager"}
SAC_OP: Settings = {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"}
FULL_AC: Settings = {"activation_checkpoint__mode": "full"}
DOCUMENTS: Settings = {"data__document_mask": True}
SIX_LAYERS: Settings = {"model__n_layers": 6}  # torchtitan's debugmodel, which is cut into 8 parts below
SAVE: Settings = {"checkpoint__enable": True, "checkpoint__interval": 100}
FLOAT8: Settings = {"model__converters": ["quantize.linear.float8"], "model__dim": 64, "model__vocab_size": 288}
FLOAT8_GATHER: Settings = {
    **FLOAT8,
    "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
    "quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp": True,
    "quantize__linear__float8__emulate": True,
}


def schedule(name: str) -> Settings:
    return {"parallelism__pipeline_parallel_schedule": name}


def layers_per_part(number: int) -> Settings:
    return {"parallelism__pipeline_parallel_layers_per_stage": number}


MATRIX: dict[str, Combination] = {
    "default": once(
        4,
        "profile_traces/iteration_2/rank3_trace.json",
        "tb/events.*",
        profiling__enable_profiling=True,
        profiling__profile_freq=2,
        profiling__profiler_warmup=1,
        metrics__enable_tensorboard=True,
    ),
    "1d_compile": once(4, **COMPILE),
    "1d_compile_sac_op": once(4, **COMPILE, **SAC_OP),
    "2d_eager": once(4, **degrees(tp=2)),
    "2d_compile": once(4, **degrees(tp=2), **COMPILE),
    "full_checkpoint": resumed(4, SAVE, SAVE),
    "last_save_model_only_fp32": once(4, "checkpoint/step-2", **SAVE, checkpoint__last_save_model_only=True),
    "pp_looped_zero_bubble": once(4, **degrees(pp=4), **schedule("InterleavedZeroBubble"), **SIX_LAYERS),
    "pp_zbv": once(2, **degrees(pp=2), **schedule("ZBVZeroBubble")),
    "pp_1f1b": once(2, **degrees(pp=2, shard=1), **schedule("1F1B")),
    "pp_gpipe": once(2, **degrees(pp=2, shard=1), **schedule("GPipe")),
    "pp_dp_1f1b": Combination(4, (degrees(pp=2, shard=2), {**degrees(pp=2, shard=2), **layers_per_part(4)})),
    "pp_dp_gpipe": once(4, **degrees(pp=2, shard=2), **schedule("GPipe")),
    "pp_tp": once(4, **degrees(pp=2, tp=2)),
    "pp_dp_tp": resumed(8, {**SAVE, **degrees(2, shard=2, tp=2)}, {**SAVE, **degrees(2, shard=2, tp=2)}),
    "3d_compile": once(8, **degrees(pp=2, shard=2, tp=2), **COMPILE),
    "pp_looped_1f1b": Combination(
        4,
        (
            {**degrees(pp=4), **schedule("Interleaved1F1B"), **SIX_LAYERS},
            {**degrees(pp=4), **schedule("Interleaved1F1B"), **SIX_LAYERS, **layers_per_part(1)},
        ),
    ),
    "pp_custom_csv": once(
        2, **degrees(pp=2), **schedule("PipelineScheduleMulti"), parallelism__pipeline_parallel_schedule_csv=CSV
    ),
    "optimizer_foreach": once(2, optimizer__name="AdamW", optimizer__implementation="foreach"),
    "ddp": once(4, **degrees(replicate=4, shard=1)),
    "hsdp": once(4, **degrees(replicate=2, shard=2)),
    "fsdp+flex_attn": once(4, **degrees(shard=4), **FULL_AC, **DOCUMENTS),
    "fsdp+flex_attn+per_op_sac": once(4, **degrees(shard=4), **SAC_OP, **DOCUMENTS),
    "cp_allgather": once(4, **degrees(cp=4), parallelism__context_parallel_rotate_method="allgather"),
    "cp_alltoall": once(4, **degrees(cp=4), parallelism__context_parallel_rotate_method="alltoall"),
    "hsdp+tp": once(8, **degrees(replicate=2, shard=2, tp=2)),
    "fsdp+cp": once(4, **degrees(shard=2, cp=2)),
    "hsdp+cp_without_dp_shard": once(4, **degrees(replicate=2, shard=1, cp=2)),
    "hsdp+cp_with_dp_shard": once(8, **degrees(replicate=2, shard=2, cp=2)),
    "fsdp+tp+cp": once(8, **degrees(shard=2, cp=2, tp=2)),
    "cpu_offload+opt_in_bwd+TP+DP+CP": resumed(
        8,
        {**SAVE, **degrees(cp=2, tp=2), "training__enable_cpu_offload": True},
        {**SAVE, **degrees(replicate=2, cp=2, tp=2), "training__enable_cpu_offload": True},
    ),
    "fsdp_reshard_always": once(2, parallelism__fsdp_reshard_after_forward="always"),
    "optional_checkpoint": resumed(4, SAVE, {**SAVE, **degrees(tp=2)}),
    "float8_emulation": once(4, **FLOAT8_GATHER),
    "gradient_accumulation": once(2, training__local_batch_size=8, training__global_batch_size=32),
    "validation_tp_cp_pp": once(
        8, **degrees(pp=2, cp=2, tp=2), **schedule("Interleaved1F1B"), validation__enable=True, validation__freq=2
    ),
    "dataloader_kwargs": once(
        2,
        training__dataloader__num_workers=2,
        training__dataloader__pin_memory=True,
        training__dataloader__persistent_workers=True,
        training__dataloader__prefetch_factor=4,
    ),
    # models.py and h100.py, without experts
    "qwen3_fsdp+tp": once(4, **degrees(shard=2, tp=2), model__name="qwen3", model__head_dim=16),
    "float8": once(4, **degrees(shard=2, tp=2), **FLOAT8, **COMPILE),
    "hsdp+cp+compile+float8": once(8, **degrees(replicate=2, shard=2, cp=2), **FLOAT8_GATHER, **COMPILE),
}

QUICK = (
    "default",
    "last_save_model_only_fp32",
    "pp_looped_zero_bubble",
    "pp_custom_csv",
    "optimizer_foreach",
    "fsdp+flex_attn+per_op_sac",
    "cp_alltoall",
    "fsdp_reshard_always",
    "gradient_accumulation",
    "dataloader_kwargs",
)
"""Those that differ from other tests' runs by more than the mesh; the rest runs with `-m slow`."""

REFUSED: dict[str, tuple[int, Settings, str]] = {
    "2d_asynctp_compile": (
        4,
        {**degrees(tp=2), "compile__enable": True, "parallelism__enable_async_tensor_parallel": True},
        "parallelism.enable_async_tensor_parallel",
    ),
    "model_only_hf_checkpoint": (4, {**SAVE, "checkpoint__last_save_in_hf": True}, "checkpoint.last_save_in_hf"),
    "last_save_model_only_bf16": (4, {**SAVE, "checkpoint__export_dtype": "bfloat16"}, "checkpoint.export_dtype"),
    "fsdp+varlen_attn+per_op_sac": (4, {"model__flavor": "debugmodel_varlen_attn"}, "model.flavor"),
    "fsdp2_memory_estimation": (2, {"memory_estimation__enable": True}, "memory_estimation.enable"),
    "deepseek_v3": (4, {"model__name": "deepseek_v3"}, "model.name"),
    "llama4": (4, {"model__name": "llama4"}, "model.name"),
    "gpt_oss": (4, {"model__name": "gpt_oss"}, "model.name"),
    "qwen3_fsdp+tp+ep": (8, {"parallelism__expert_parallel_degree": 4}, "parallelism.expert_parallel_degree"),
    "ft": (8, {"fault_tolerance__enable": True}, "fault_tolerance.enable"),
    "seed_checkpoint": (1, {"checkpoint__create_seed_checkpoint": True}, "checkpoint.create_seed_checkpoint"),
    # Single settings of combinations that run above without them.
    "opt_in_bwd": (8, {"optimizer__early_step_in_backward": True}, "optimizer.early_step_in_backward"),
    "flex_attn": (4, {"model__flavor": "debugmodel_flex_attn"}, "model.flavor"),
    "exclude_from_loading": (
        4,
        {**SAVE, "checkpoint__exclude_from_loading": ["optimizer"]},
        "checkpoint.exclude_from_loading",
    ),
}
"""(ranks, settings, the key of the one problem)"""

NOT_A_RUN = ("test_generate",)
"""torchtitan's combinations without training."""


pytestmark = pytest.mark.usefixtures("warm_imports")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MATRIX]
)
def test_a_combination_trains(name: str, warm_ranks: WarmRanks, tmp_path: Path) -> None:
    combination = MATRIX[name]
    folder, first_step = tmp_path / "run", 1
    for position, settings in enumerate(combination.runs):
        if position and not combination.resumes:
            folder = tmp_path / f"run-{position}"
        recipe = make_recipe(folder, **{**BASE, **settings})
        warm_ranks(train, combination.num_ranks, combination.num_ranks, recipe, timeout_seconds=250)
        lines = [line for line in read_metrics(folder) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, recipe.training.steps + 1))
        new = lines[first_step - 1 :]
        assert new[-1]["loss"] < lines[0]["loss"] - 0.05, "it does not learn"
        if combination.resumes:
            first_step = recipe.training.steps + 1
            assert open_step(folder / "checkpoint" / f"step-{recipe.training.steps}") is not None
    for pattern in combination.leaves:
        assert list(folder.glob(pattern)), f"there is no {pattern}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Before anything starts, with the key to change."""
    num_ranks, settings, key = REFUSED[name]
    values = {"model.name": "llama3", "job.dump_folder": str(tmp_path), "training.local_batch_size": 4}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    recipe = inspect_recipe(argv_of(values), found := Findings())
    if recipe is not None and not found.problems:
        plan_run(recipe, found, num_ranks=num_ranks, device_type="cpu")
    assert [problem.key for problem in found.problems] == [key]


def test_the_document_has_every_combination() -> None:
    """One row each, in one of its tables."""
    names = re.findall(r"^\| `([^`]+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert len(names) == len(set(names))
    assert set(names) == {*MATRIX, *REFUSED, *NOT_A_RUN}
