"""Meshes, pipelines and schedules that cannot be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from tests.recipes.bad_data import writes
from tests.recipes.bad_inputs import Case


def parallel(name: str, message: str, num_ranks: int = 2, more: str = "", **keys: object) -> Case:
    """A case with keys of [parallelism], of which `tensor`, `pipeline` and `context` are degrees."""
    degrees = ("tensor", "pipeline", "context")
    spelled = {f"{key}_parallel_degree" if key in degrees else key: value for key, value in keys.items()}
    table = "".join(f"{key} = {_toml(value)}\n" for key, value in spelled.items())
    return Case(name, message, toml=f"[parallelism]\n{table}{more}", environ={"NGPU": str(num_ranks)})


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value)


DEGREES = [
    parallel("degree 0", r"tensor_parallel_degree: must be at least 1, got 0", tensor=0),
    parallel("degree negative", r"pipeline_parallel_degree: must be at least 1, got -2", pipeline=-2),
    parallel(
        "tensor parallel on one rank",
        r"tensor_parallel_degree: 2 does not divide the 1 rank\. .*NGPU to a multiple",
        num_ranks=1,
        tensor=2,
    ),
    parallel(
        "degrees beyond the ranks",
        r"pp 2 x tp 2 = 4 does not divide the 2 ranks",
        pipeline=2,
        tensor=2,
    ),
    parallel(
        "all degrees given, one too many",
        r"pp 2 x dp_replicate 1 x dp_shard 2 x tp 2 = 8, but there are 4 ranks.*NGPU to 8",
        num_ranks=4,
        pipeline=2,
        tensor=2,
        data_parallel_shard_degree=2,
    ),
    parallel(
        "tensor parallel: key/value heads",
        r"tensor_parallel_degree: 4 does not divide the model's 2 key/value heads",
        num_ranks=4,
        tensor=4,
    ),
    parallel(
        "tensor parallel: query heads",
        r"tensor_parallel_degree: 3 does not divide the model's 4 query heads",
        num_ranks=3,
        tensor=3,
    ),
    parallel(
        "tensor parallel: hidden_dim",
        r"2 does not divide the model's 65 channels of the SwiGLU hidden layer",
        more="[model]\nhidden_dim = 65",
        tensor=2,
    ),
    parallel(
        "tensor parallel: sequence",
        r"training\.seq_len: 33 is not a multiple of tensor-parallel degree 2 = 2\. 32 or 34 would fit",
        more="[training]\nseq_len = 33",
        tensor=2,
    ),
    parallel(
        "tensor parallel: validation sequence",
        r"validation\.seq_len: 31 is not a multiple of tensor-parallel degree 2",
        more="[validation]\nenable = true\nseq_len = 31",
        tensor=2,
    ),
    parallel(
        "context parallel: sequence",
        r"training\.seq_len: 34 is not a multiple of 2 x context-parallel degree 2 = 4\. 32 or 36 would fit",
        more="[training]\nseq_len = 34",
        context=2,
    ),
    parallel(
        "context and tensor parallel: sequence",
        r"training\.seq_len: 36 is not a multiple of tensor-parallel degree 2 x 2 x context-parallel degree 2 = 8",
        num_ranks=4,
        more="[training]\nseq_len = 36",
        context=2,
        tensor=2,
    ),
    parallel(
        "load balancer that needs FlexAttention",
        r"context_parallel_load_balancer: 'ptrr' needs FlexAttention.*'headtail' or 'none'",
        context=2,
        context_parallel_load_balancer="ptrr",
    ),
    parallel(
        "rotation unknown",
        r"context_parallel_rotate_method: must be one of 'allgather', 'alltoall', got 'ring'",
        context=2,
        context_parallel_rotate_method="ring",
    ),
    parallel(
        "asynchronous tensor parallel on a CPU",
        r"enable_async_tensor_parallel: needs CUDA .* Set it to false",
        more="[compile]\nenable = true",
        tensor=2,
        enable_async_tensor_parallel=True,
    ),
    parallel(
        "asynchronous tensor parallel without compile",
        r"enable_async_tensor_parallel: needs compile\.enable = true",
        tensor=2,
        enable_async_tensor_parallel=True,
    ),
    parallel("expert parallel", r"expert_parallel_degree: 2 is not supported", expert_parallel_degree=2),
]


def pipelined(name: str, message: str, num_ranks: int = 2, batch: int = 4, more: str = "", **keys: object) -> Case:
    """A pipeline over all ranks, with keys of [parallelism] that begin with `pipeline_parallel_`, or `names`."""
    spelled = {
        "module_fqns_per_model_part" if key == "names" else f"pipeline_parallel_{key}": keys[key] for key in keys
    }
    training = f"[training]\nlocal_batch_size = {batch}\nglobal_batch_size = {batch}\n"
    return parallel(name, message, num_ranks, training + more, pipeline=num_ranks, **spelled)


SPLITS = "splits the backward pass"
COMPILED = "[compile]\nenable = true\n"

PIPELINE = [
    pipelined("pipeline: unknown schedule", r"unknown schedule '1F2B'; .* Did you mean '1F1B'", schedule="1F2B"),
    pipelined(
        "pipeline: base class as schedule",
        r"PipelineScheduleMulti is only the base class of schedules",
        schedule="PipelineScheduleMulti",
    ),
    pipelined(
        "pipeline: more parts than layers",
        r"pipeline_parallel_degree: makes 8 parts: more pipeline parts than layers",
        num_ranks=8,
        batch=8,
    ),
    pipelined(
        "pipeline: too few layers before the growth",
        r"pipeline_parallel_degree: makes 4 parts: more pipeline parts than layers .* 1 \+ 1 \+ 1 = 3",
        num_ranks=4,
        more='[[growth.stages]]\nat = "2 steps"\nfactor = 4',
    ),
    pipelined(
        "pipeline: microbatch does not divide",
        r"pipeline_parallel_microbatch_size: 3 does not divide training\.local_batch_size 4",
        microbatch_size=3,
    ),
    pipelined(
        "pipeline: too few microbatches",
        r"local_batch_size: 2 makes 2 microbatches of 1, but 1F1B needs at least as many as parts, 4\. 4 would fit",
        num_ranks=4,
        batch=2,
    ),
    pipelined(
        "pipeline: uneven rounds",
        r"local_batch_size: 5 makes 5 microbatches of 1, but Interleaved1F1B takes them in 2 equal rounds",
        batch=5,
        schedule="Interleaved1F1B",
    ),
    pipelined(
        "pipeline: DualPipeV with too few microbatches",
        r"local_batch_size: 2 makes 2 microbatches of 1, but DualPipeV needs at least as many as parts, 4",
        batch=2,
        schedule="DualPipeV",
    ),
    pipelined(
        "pipeline: layers per part",
        r"layers_per_stage: 1 makes 6 parts of 4 layers \+ 2 less_layers, but 1F1B takes exactly one part per rank, 2",
        layers_per_stage=1,
    ),
    pipelined(
        "pipeline: first part shorter than nothing",
        r"first_stage_less_layers: 9 is more than the \d+ layers of the first part",
        first_stage_less_layers=9,
    ),
    pipelined(
        "pipeline: too many parts by name",
        r"module_fqns_per_model_part: has 3 parts, but 1F1B takes exactly one part per rank, 2",
        names=[["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["layers.3", "norm", "output"]],
    ),
    pipelined(
        "pipeline: a layer left out",
        r"module_fqns_per_model_part: lacks 'layers\.1'; the model has 4 layers",
        names=[["tok_embeddings", "layers.0"], ["layers.2", "layers.3", "norm", "output"]],
    ),
    pipelined(
        "pipeline: a layer twice",
        r"module_fqns_per_model_part: holds 'layers\.1' more than once",
        names=[["tok_embeddings", "layers.0", "layers.1"], ["layers.1", "layers.2", "layers.3", "norm", "output"]],
    ),
    pipelined(
        "pipeline: a module that is not there",
        r"module_fqns_per_model_part: unknown 'embeddings'; .* Did you mean 'tok_embeddings'",
        names=[["embeddings", "layers.0", "layers.1"], ["layers.2", "layers.3", "norm", "output"]],
    ),
    pipelined(
        "pipeline: layers out of order",
        r"part 0 holds layers\.2 where layers\.1 should follow",
        names=[["tok_embeddings", "layers.0", "layers.2"], ["layers.1", "layers.3", "norm", "output"]],
    ),
    pipelined(
        "pipeline: head on the first part",
        r"'output' is in part 0, but belongs in part 1, the last",
        names=[["tok_embeddings", "layers.0", "layers.1", "output"], ["layers.2", "layers.3", "norm"]],
    ),
    pipelined(
        "pipeline: parts by name, and growth",
        r"module_fqns_per_model_part: .*A run that grows has several depths, and no single list fits all",
        names=[["tok_embeddings", "layers.0", "layers.1"], ["layers.2", "layers.3", "norm", "output"]],
        more='[[growth.stages]]\nat = "2 steps"\nfactor = 2',
    ),
    parallel(
        "pipeline: split backward, reshard",
        rf'fsdp_reshard_after_forward: "always" gives wrong gradients with the ZBVZeroBubble .* {SPLITS}',
        pipeline=2,
        pipeline_parallel_schedule="ZBVZeroBubble",
        fsdp_reshard_after_forward="always",
    ),
    pipelined(
        "pipeline: split backward, compile",
        rf"compile\.enable: the InterleavedZeroBubble schedule {SPLITS}, which compiled layers do not allow",
        schedule="InterleavedZeroBubble",
        more=COMPILED,
    ),
    pipelined(
        "pipeline: split backward, single operations recomputed",
        rf"selective_ac_option: the DualPipeV schedule {SPLITS}",
        schedule="DualPipeV",
        more='[activation_checkpoint]\nmode = "selective"\nselective_ac_option = "op"',
    ),
]


def schedule_file(name: str, message: str, lines: Sequence[str], batch: int = 2, **keys: object) -> Case:
    """A schedule of two ranks that is read from a file."""
    case = pipelined(f"schedule file: {name}", message, batch=batch, schedule_csv="schedule.csv", **keys)
    return replace(case, setup=writes("schedule.csv", "\n".join(lines).encode("latin-1")))


GOOD = ("0F0,0F1,,0B0,0B1", "1F0,1B0,1F1,1B1")

FILES = [
    pipelined("schedule file: missing", r"nowhere\.csv does not exist\. Give", schedule_csv="nowhere.csv"),
    pipelined("schedule file: a folder", r"pipeline_parallel_schedule_csv: \. is not a file", schedule_csv="."),
    schedule_file("empty", r"schedule\.csv has 0 lines of actions, but .*_degree is 2", []),
    schedule_file("a line for one rank only", r"has 1 line of actions, but .*_degree is 2", GOOD[:1]),
    schedule_file("not text", r"schedule\.csv is not UTF-8 text", ["\xff", "\xfe"]),
    schedule_file("not an action", r"line 1: '0X0' is not an action", ["0X0,0F1,,0B0,0B1", GOOD[1]]),
    schedule_file("garbage behind an action", r"line 2: '1B1x' is not an action", [GOOD[0], "1F0,1B0,1F1,1B1x"]),
    schedule_file("communication", r"line 1: '0SEND_F0' is not a computation", ["0F0,0SEND_F0,0F1,0B0,0B1", GOOD[1]]),
    schedule_file("an action twice", r"line 1: 0F0 is there more than once", ["0F0,0F0,0F1,0B0,0B1", GOOD[1]]),
    schedule_file("a forward missing", r"line 2: 1F1 is missing", [GOOD[0], "1F0,1B0,1B1"]),
    schedule_file("a backward missing", r"line 1: 0F1 has no backward", ["0F0,0F1,,0B0", GOOD[1]]),
    schedule_file("backward first", r"line 2: 1B0 comes before 1F0", [GOOD[0], "1B0,1F0,1F1,1B1"]),
    schedule_file(
        "last part out of order",
        r"line 2: 1F0 comes after 1F1, but .* gradients would be wrong",
        [GOOD[0], "1F1,1F0,1B0,1B1"],
    ),
    schedule_file(
        "ranks that wait for each other",
        r"cannot be executed, its ranks wait for each other: line 1 stops at 0B0, .* line 2 stops at 1F1",
        ["0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1"],
    ),
    schedule_file("a part on two ranks", r"line 2: part 0 is on line 1 already", [GOOD[0], "0F0,0B0,0F1,0B1"]),
    schedule_file("a part left out", r"line 2: names part 2 but not part 1", [GOOD[0], "2F0,2B0,2F1,2B1"]),
    schedule_file(
        "of other microbatches",
        r"has 2 microbatches, but training\.local_batch_size 4 in microbatches of 1 makes 4",
        GOOD,
        batch=4,
    ),
    schedule_file(
        "of other parts",
        r"module_fqns_per_model_part: has 3 parts, but .*schedule_csv has 2",
        GOOD,
        names=[["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["layers.3", "norm", "output"]],
    ),
]

CASES = DEGREES + PIPELINE + FILES
