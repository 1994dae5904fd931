"""Combinations of settings that cannot train are refused before anything starts, each with one problem.

One cause must not be reported twice, by the checks between keys and by a stage, and the key must be one that the user
can change. Settings that are only unwise get a warning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.runs import BASE, argv_of
from titan_growth.config.loader import inspect_recipe
from titan_growth.run.plan import plan_run
from titan_growth.stages import compile as compile_stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings

SHORT = {
    "pp": "parallelism.pipeline_parallel_degree",
    "replicate": "parallelism.data_parallel_replicate_degree",
    "shard": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "schedule": "parallelism.pipeline_parallel_schedule",
    "csv": "parallelism.pipeline_parallel_schedule_csv",
    "names": "parallelism.module_fqns_per_model_part",
    "per_part": "parallelism.pipeline_parallel_layers_per_stage",
    "first_less": "parallelism.pipeline_parallel_first_stage_less_layers",
    "last_less": "parallelism.pipeline_parallel_last_stage_less_layers",
    "microbatch": "parallelism.pipeline_parallel_microbatch_size",
    "reshard": "parallelism.fsdp_reshard_after_forward",
    "async_tp": "parallelism.enable_async_tensor_parallel",
    "ac": "activation_checkpoint.mode",
    "ac_option": "activation_checkpoint.selective_ac_option",
    "compile": "compile.enable",
    "components": "compile.components",
    "backend": "compile.backend",
    "converters": "model.converters",
    "filtered": "quantize.linear.float8.filter_fqns",
    "batch": "training.local_batch_size",
    "global_batch": "training.global_batch_size",
    "seq_len": "training.seq_len",
    "chunk": "training.loss_chunk_tokens",
}
"""Short names of recipe keys for the table below."""


class Case(NamedTuple):
    """Settings on top of `tests.runs.BASE`, and their one problem."""

    name: str
    num_ranks: int
    settings: dict[str, Any]
    key: str
    message: str


def case(name: str, num_ranks: int, key: str, message: str, /, **settings: Any) -> Case:
    return Case(name, num_ranks, settings, SHORT.get(key, key), message)


FLOAT8 = {"converters": ["quantize.linear.float8"]}
FLOAT8_SIZES = {**FLOAT8, "model__dim": 64, "model__vocab_size": 288}  # multiples of 16 on 2 ranks
COMPILED = {"compile": True, "backend": "aot_eager"}
SPLIT = {"pp": 2, "schedule": "ZBVZeroBubble"}
OP = {"ac": "selective", "ac_option": "op"}

CASES = [
    # Degrees and ranks.
    case("degrees beyond the ranks", 2, "pp", "pp 2 x tp 2 = 4 does not divide the 2 ranks", pp=2, tp=2),
    case("one degree beyond the ranks", 4, "tp", "8 does not divide the 4 ranks", tp=8),
    case("degrees below the ranks", 8, "shard", "dp_shard 2 x tp 2 = 4, but there are 8 ranks", shard=2, tp=2),
    case("no shard degree", 2, "shard", "must be -1 (all ranks that are left) or at least 1, got 0", shard=0),
    case("a batch that data-parallel ranks cannot share", 4, "global_batch", "8 is not a multiple of", batch=4),
    # Sizes under tensor and context parallelism.
    case("heads and channels, reported together", 3, "tp",
         "the model's 4 query heads (model.n_heads), 2 key/value heads (model.n_kv_heads), 256 channels",
         tp=3, seq_len=33),
    case("key and value heads", 4, "tp", "4 does not divide the model's 2 key/value heads", tp=4),
    case("hidden channels", 2, "tp", "2 does not divide the model's 97 channels", tp=2, model__hidden_dim=97),
    case("a vocabulary smaller than the degree", 4, "tp", "4 is more than the vocabulary's 3 entries", tp=4,
         model__vocab_size=3, model__n_kv_heads=4),
    case("sequences under tp", 2, "seq_len", "33 is not a multiple of tensor-parallel degree 2 = 2", tp=2, seq_len=33),
    case("sequences under cp", 2, "seq_len", "34 is not a multiple of 2 x context-parallel degree 2 = 4", cp=2,
         seq_len=34),
    case("sequences under both, reported once", 4, "seq_len",
         "36 is not a multiple of tensor-parallel degree 2 x 2 x context-parallel degree 2 = 8", tp=2, cp=2,
         seq_len=36),
    case("validation sequences", 2, "validation.seq_len", "30 is not a multiple of 2 x context-parallel degree 2", cp=2,
         validation__enable=True, validation__seq_len=30),
    # Pipelines.
    case("more parts than layers", 8, "pp", "more pipeline parts than layers", pp=8, batch=8),
    case("more parts than layers of an interleaved schedule", 4, "pp", "makes 8 parts: more pipeline parts than layers",
         pp=4, batch=8, schedule="Interleaved1F1B"),
    case("a model that is too small until it grows", 4, "pp", "and last parts' less_layers, 3 + 1 + 1 = 5",
         pp=4, batch=8, schedule="Interleaved1F1B", model__n_layers=12, checkpoint__enable=True,
         growth__stages='[{at = "3 steps", factor = 4}]'),
    case("first_less beyond the first part", 2, "first_less", "6 is more than the", pp=2, first_less=6, last_less=0),
    case("a single schedule with two parts per rank", 2, "per_part", "1F1B takes exactly one part per rank, 2", pp=2,
         per_part=2, batch=8),
    case("an interleaved schedule with one part per rank", 2, "per_part",
         "Interleaved1F1B takes two or more parts per rank", pp=2, per_part=3, batch=8, schedule="Interleaved1F1B"),
    case("a V schedule with three parts per rank", 2, "per_part", "ZBVZeroBubble takes exactly two parts per rank, 4",
         **SPLIT, per_part=1, batch=8),
    case("a V schedule with other names", 2, "names", "has 2 parts, but DualPipeV takes exactly two parts per rank, 4",
         pp=2, batch=8, schedule="DualPipeV",
         names=[["tok_embeddings", "layers.0", "layers.1"], ["layers.2", "layers.3", "norm", "output"]]),
    case("a module left out", 2, "names", "lacks 'layers.3'", pp=2,
         names=[["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "norm", "output"]]),
    case("too few microbatches", 2, "batch", "1F1B needs at least as many as parts, 2", pp=2, batch=1),
    case("too few microbatches for a V schedule", 2, "batch", "DualPipeV needs at least as many as parts, 4", pp=2,
         schedule="DualPipeV", batch=2),
    case("microbatches that make no rounds", 2, "batch", "in 2 equal rounds (5 // pp 2)", pp=2, batch=5,
         global_batch=5, schedule="Interleaved1F1B"),
    case("a microbatch size that does not divide the batch", 2, "microbatch", "3 does not divide", pp=2, microbatch=3),
    case("an unknown schedule", 2, "schedule", "unknown schedule '1F2B'", pp=2, schedule="1F2B"),
    case("an abstract schedule", 2, "schedule", "PipelineScheduleMulti is only the base class", pp=2,
         schedule="PipelineScheduleMulti"),
    case("a schedule file that is not there", 2, "csv", "/none.csv does not exist", pp=2, csv="/none.csv"),
    # Schedules that split the backward pass.
    case("a split backward pass, always resharded", 4, "reshard", "gives wrong gradients with the ZBVZeroBubble",
         **SPLIT, reshard="always"),
    case("a split backward pass, compiled", 2, "compile", "which compiled layers do not allow", **SPLIT, **COMPILED),
    case("a split backward pass, single operations", 2, "ac_option", "in which single operations cannot be recomputed",
         **SPLIT, **OP),
    # Checkpointing and compile.
    case("a memory budget without the compiler", 1, "ac", "needs compile.enable = true", ac="memory_budget"),
    case("a memory budget with the loss compiled", 1, "ac", 'with "model" in compile.components', ac="memory_budget",
         **COMPILED, components=["loss"]),
    case("compiled single operations under tp", 2, "ac_option", "inside compiled layers under tensor parallelism",
         tp=2, **COMPILED, **OP),
    case("an unknown backend", 1, "backend", "there is no backend 'inductr'", compile=True, backend="inductr"),
    case("nothing to compile", 1, "components", "is empty, but compile.enable is true", **COMPILED, components=[]),
    case("async tp without the compiler", 2, "async_tp", "needs compile.enable = true", tp=2, async_tp=True),
    case("async tp on another backend", 2, "async_tp", "needs compile.backend = 'inductor'", tp=2, async_tp=True,
         **COMPILED),
    case("async tp on a CPU", 2, "async_tp", "needs CUDA", tp=2, async_tp=True, compile=True),
    # Float8.
    case("Float8 with odd sizes", 1, "converters", "multiples of 16, but the model has output (32 -> 258)", **FLOAT8),
    case("Float8 with odd sizes on each rank", 2, "converters",
         "multiples of 16 on each tensor-parallel rank, but the model has wk (64 -> 8), wv (64 -> 8)", tp=2, **FLOAT8,
         model__dim=64, model__n_heads=8, model__n_kv_heads=2, model__vocab_size=288),
    case("a Float8 head that computes the loss", 1, "filtered", "cannot be a Float8 layer", **FLOAT8_SIZES, chunk=20),
    case("Float8 in rows, gathered", 2, "quantize.linear.float8.enable_fsdp_float8_all_gather", "'tensorwise'",
         **FLOAT8_SIZES, quantize__linear__float8__recipe_name="rowwise",
         quantize__linear__float8__enable_fsdp_float8_all_gather=True),
]  # fmt: skip


def found(settings: dict[str, Any], num_ranks: int, device_type: str = "cpu") -> tuple[list[Problem], list[Problem]]:
    """(problems, warnings) of a recipe, as the preflight puts them together."""
    named = {SHORT.get(name, name.replace("__", ".")): value for name, value in settings.items()}
    values = {**BASE, "job.dump_folder": "/tmp/x", "training.dataset_path": "/tmp/none", **named}
    recipe = inspect_recipe(argv_of(values), found := Findings())
    if recipe is None:
        return found.problems, found.warnings
    plan = plan_run(recipe, planning := Findings(), num_ranks=num_ranks, device_type=device_type)
    assert (plan is None) == bool(planning.problems)
    known = {problem.key for problem in found.problems}
    others = [problem for problem in planning.problems if problem.key not in known]
    return found.problems + others, found.warnings + planning.warnings


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_with_one_problem(case: Case) -> None:
    problems, _ = found(case.settings, case.num_ranks)
    assert [problem.key for problem in problems] == [case.key], [str(problem) for problem in problems]
    assert case.message in problems[0].message


def test_inductor_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it writes C++."""
    monkeypatch.setattr(compile_stage.shutil, "which", lambda name: None)
    (problem,), _ = found({"compile": True}, 1)
    assert problem.key == "compile.backend"
    assert "needs a C++ compiler on a CPU" in problem.message
    assert found({"compile": True}, 1, device_type="cuda")[0] == []
    assert found(COMPILED, 1)[0] == []


UNWISE = [
    case("fewer microbatches than parts", 2, "batch", "ranks wait for each other", pp=2, batch=2, schedule="GPipe",
         microbatch=2),
    case("no effect of the rotation", 2, "parallelism.context_parallel_rotate_method", "gathered, not rotated", cp=2,
         parallelism__context_parallel_rotate_method="alltoall"),
    case("no effect of the loss on split words", 2, "parallelism.disable_loss_parallel", "vocabulary is always split",
         tp=2, parallelism__disable_loss_parallel=True, chunk=20),
    case("a schedule beside a file", 2, "schedule", "is not used", pp=2, schedule="GPipe", batch=4,
         csv="tests/distributed/schedule_pp2.csv"),
]  # fmt: skip


@pytest.mark.parametrize("case", UNWISE, ids=lambda case: case.name)
def test_it_is_warned_about(case: Case) -> None:
    problems, warnings = found(case.settings, case.num_ranks)
    assert problems == []
    assert [warning.key for warning in warnings] == [case.key]
    assert case.message in warnings[0].message


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (4, {**SPLIT, "reshard": "never"}),
        (4, {**SPLIT, "ac": "full"}),
        (2, {"pp": 2, "schedule": "Interleaved1F1B", "batch": 8, **COMPILED}),
        (2, {"pp": 2, **OP, **COMPILED}),
        (2, {"tp": 2, **FLOAT8_SIZES}),
        (1, {**FLOAT8_SIZES, "filtered": ["output"], "chunk": 20}),
        (1, {**FLOAT8, "filtered": ["output"]}),
        (2, {"tp": 2, "ac": "memory_budget", **COMPILED}),
        (2, {"cp": 2, **OP, **COMPILED}),
        (2, {"tp": 2, "model__vocab_size": 261}),
    ],
)
def test_neighbours_of_the_impossible_are_accepted(num_ranks: int, settings: dict[str, Any]) -> None:
    assert found(settings, num_ranks)[0] == []
