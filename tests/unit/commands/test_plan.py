"""The plan on paper: shares of ranks against arithmetic and against built models, growth, and the command."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.harness import run_ranks
from tests.runs import BASE, argv_of
from titan_growth.__main__ import main
from titan_growth.commands.plan_report import report_lines, timeline
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema.recipe import ModelConfig
from titan_growth.engine.build import build
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.state import model_tensors, optimizer_tensors
from titan_growth.layout.mesh import Mesh
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.layout.pipeline_layout import plan_pipeline
from titan_growth.layout.pipeline_parts import Part
from titan_growth.layout.shards import LAYER, ModelShards, chunk_size
from titan_growth.models.registry import FAMILIES, family_module, model_config_of
from titan_growth.run import plan as plan_module
from titan_growth.run.plan import RunPlan, plan_run
from titan_growth.tools.findings import Findings

ROOT = Path(__file__).resolve().parents[3]

UNEVEN = {
    **BASE,
    "model.dim": 36,
    "model.head_dim": 10,
    "model.n_layers": 5,
    "model.hidden_dim": 90,
    "model.vocab_size": 131,
    "training.local_batch_size": 4,
    "training.global_batch_size": -1,
}
"""Sizes that few meshes divide evenly."""


def plan_of(values: dict[str, Any], num_ranks: int, device_type: str = "cpu") -> RunPlan:
    recipe = inspect_recipe(argv_of(values), found := Findings())
    assert recipe is not None
    plan = plan_run(recipe, planning := Findings(), num_ranks=num_ranks, device_type=device_type)
    assert plan is not None, [str(problem) for problem in found.problems + planning.problems]
    return plan


def shards_of(plan: RunPlan) -> ModelShards:
    return ModelShards(plan.target, family_module(plan.recipe.model.name), plan.phase.mesh_shape)


def parts_by_rank(plan: RunPlan) -> list[tuple[Part, ...]]:
    if plan.phase.mesh_shape.pp == 1:
        return [(Part(0, tuple(range(plan.target.num_layers)), first=True, last=True),)]
    section, batch = plan.recipe.parallelism, plan.recipe.training.local_batch_size
    layout = plan_pipeline(section, plan.target.num_layers, batch, Findings())
    assert layout is not None
    return [layout.parts_of(place) for place in range(plan.phase.mesh_shape.pp)]


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "num_chunks"), [(8, 1), (8, 2), (7, 3), (9, 4), (5, 8), (1, 4), (131, 6), (10, 7)])
def test_chunks_are_those_of_torch(size: int, num_chunks: int) -> None:
    expected = [len(chunk) for chunk in torch.arange(size).chunk(num_chunks)]
    expected += [0] * (num_chunks - len(expected))
    assert [chunk_size(size, num_chunks, index) for index in range(num_chunks)] == expected


MESHES = [
    MeshShape(),
    MeshShape(dp_shard=3),
    MeshShape(dp_shard=7, tp=2),
    MeshShape(dp_replicate=2, dp_shard=2, cp=3, tp=4),
    MeshShape(dp_shard=500),
    MeshShape(pp=2, dp_shard=2, tp=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_unique_shares_add_up_to_the_model(mesh: MeshShape, family: str, tied: bool) -> None:
    """Over all parts and all ranks that share a copy; what several `tp` ranks hold alike counts on the first."""
    sizes = {"dim": 36, "n_layers": 5, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 92, "vocab_size": 131}
    section = ModelConfig(name=family, flavor="custom", **sizes, head_dim=8, tie_word_embeddings=tied)
    config = model_config_of(section, found := Findings())
    assert config is not None, found.problems
    shards = ModelShards(config, family_module(family), mesh)
    assert shards.num_params == config.num_params
    assert shards.numel(LAYER) == config.num_layer_params
    total = 0
    for piece, parameters in shards.pieces.items():
        times = config.num_layers if piece == LAYER else 0 if piece == "output" and tied else 1
        for parameter in parameters:
            ranks = product(range(1 if parameter.tp_dim is None else mesh.tp), range(mesh.fsdp_degree))
            shares = [parameter.local_numel(mesh, *place) for place in ranks]
            assert sum(shares) == parameter.numel
            total += times * sum(shares)
    assert total == config.num_params


@pytest.mark.parametrize(
    ("family", "flavor"), [(family, flavor) for family in FAMILIES for flavor in family_module(family).FLAVORS]
)
def test_one_layer_tells_the_parameters_of_every_flavor(family: str, flavor: str) -> None:
    if flavor == "custom":
        pytest.skip("has no sizes of its own")
    config = model_config_of(ModelConfig(name=family, flavor=flavor), found := Findings())
    assert config is not None, found.problems
    assert ModelShards(config, family_module(family), MeshShape(dp_shard=8, tp=2)).num_params == config.num_params


# ---- against built models --------------------------------------------------------------------------------------------


def _built_numel(rank: int, values: dict[str, Any], num_ranks: int) -> tuple[tuple[int, int, int], int, int]:
    """((pp, tp, fsdp rank), elements of the parameters on this rank, elements of its moments)."""
    plan = plan_of(values, num_ranks)
    mesh = Mesh.get(plan.phase.mesh_shape, "cpu")
    model = build(
        plan.target,
        family=plan.recipe.model.name,
        mesh=mesh,
        stages=plan.phase.stages,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seq_len=plan.recipe.training.seq_len,
        seed=None,
    )
    optimizer = Optimizer.of(model, plan.recipe.optimizer, max_norm=1.0)
    moments = [tensor for kept in optimizer.states.values() for key, tensor in kept.items() if "exp" in key]
    fsdp_rank = mesh.rank_of("dp_shard") * plan.phase.mesh_shape.cp + mesh.rank_of("cp")
    place = mesh.rank_of("pp"), mesh.rank_of("tp"), fsdp_rank
    return place, _local_numel(part for parts in model.parts for part in parts.parameters()), _local_numel(moments)


def _local_numel(tensors: Any) -> int:
    return sum(tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel() for tensor in tensors)


P = "parallelism."
BUILDS = {
    "one rank": (1, {}),
    "fsdp 3": (3, {}),
    "fsdp 8": (8, {}),
    "hsdp": (4, {P + "data_parallel_replicate_degree": 2}),
    "tp": (2, {P + "tensor_parallel_degree": 2}),
    "fsdp 3 x tp": (6, {P + "tensor_parallel_degree": 2}),
    "cp x fsdp": (4, {P + "context_parallel_degree": 2}),
    "pp": (2, {P + "pipeline_parallel_degree": 2}),
    "pp x fsdp x tp": (8, {P + "pipeline_parallel_degree": 2, P + "tensor_parallel_degree": 2}),
    "V x fsdp": (4, {P + "pipeline_parallel_degree": 2, P + "pipeline_parallel_schedule": "ZBVZeroBubble"}),
    "interleaved": (2, {P + "pipeline_parallel_degree": 2, P + "pipeline_parallel_schedule": "Interleaved1F1B"}),
    "tied": (2, {"model.tie_word_embeddings": True}),
    "tied tp": (2, {"model.tie_word_embeddings": True, P + "tensor_parallel_degree": 2}),
    "tied pp x fsdp": (4, {"model.tie_word_embeddings": True, P + "pipeline_parallel_degree": 2}),
    "tied V": (
        2,
        {
            "model.tie_word_embeddings": True,
            P + "pipeline_parallel_degree": 2,
            P + "pipeline_parallel_schedule": "DualPipeV",
        },
    ),
    "qwen3 fsdp x tp": (4, {"model.name": "qwen3", P + "tensor_parallel_degree": 2}),
    "chunked loss": (4, {"training.loss_chunk_tokens": 16, P + "tensor_parallel_degree": 2}),
}


@pytest.mark.parametrize("name", BUILDS)
def test_ranks_hold_what_the_plan_says(name: str) -> None:
    num_ranks, changes = BUILDS[name]
    values = {**UNEVEN, **changes}
    plan = plan_of(values, num_ranks)
    shards, parts = shards_of(plan), parts_by_rank(plan)
    built = run_ranks(_built_numel, num_ranks, values, num_ranks)
    for place, numel, moments in built:
        pp_rank, tp_rank, fsdp_rank = place
        assert numel == shards.local_numel(parts[pp_rank], tp_rank, fsdp_rank), place
        assert moments == 2 * numel
    for pp_rank, held in enumerate(parts):
        found = [numel for place, numel, _ in built if place[0] == pp_rank]
        assert (shards.held(held).least, shards.held(held).most) == (min(found), max(found))


def _checkpoint_numel(rank: int, values: dict[str, Any]) -> int:
    plan = plan_of(values, 1)
    model = build(
        plan.target,
        family=plan.recipe.model.name,
        mesh=Mesh.get(plan.phase.mesh_shape, "cpu"),
        stages=plan.phase.stages,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seq_len=plan.recipe.training.seq_len,
        seed=None,
    )
    tensors = model_tensors(model.parts) | optimizer_tensors(Optimizer.of(model, plan.recipe.optimizer, max_norm=1.0))
    return sum(tensor.numel() for tensor in tensors.values() if tensor.dim())  # without the step counters


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_stores_what_the_plan_says(tied: bool) -> None:
    values = {**UNEVEN, "model.tie_word_embeddings": tied}
    assert run_ranks(_checkpoint_numel, 1, values) == [3 * shards_of(plan_of(values, 1)).num_stored]


# ---- growth ----------------------------------------------------------------------------------------------------------


def growing(*stages: str) -> dict[str, Any]:
    values: dict[str, Any] = {**BASE, "model.n_layers": 8, "training.steps": 20, "checkpoint.enable": True}
    for index, at in enumerate(stages):
        values |= {f"growth.stages.{index}.at": at, f"growth.stages.{index}.factor": 2}
    return values


def test_phases_of_a_run_that_grows_by_steps_and_by_tokens() -> None:
    """8 sequences of 32 tokens a step: 1,000 tokens are reached in the fourth step, 3,072 exactly in the twelfth."""
    plan = plan_of(growing("1k tokens", "3072 tokens"), 1)
    found = list(timeline(plan))
    assert [phase.config.num_layers for phase, _ in found] == [2, 4, 8]
    assert [stretch.last_step for _, stretch in found] == [4, 12, 20]
    assert [stretch.tokens for _, stretch in found] == [1024, 3072, 5120]
    costs = [phase.config.flops_per_token(32) for phase, _ in found]
    spent = [4 * 256 * costs[0], 8 * 256 * costs[1], 8 * 256 * costs[2]]
    assert [stretch.flops for _, stretch in found] == [spent[0], spent[0] + spent[1], sum(spent)]
    assert [stretch.last_step for _, stretch in timeline(plan_of(growing("7 steps"), 1))] == [7, 20]


def test_report_of_a_run_that_grows() -> None:
    plan = plan_of({**growing("7 steps"), "data.document_mask": True, "checkpoint.last_save_model_only": True}, 1)
    text = "\n".join(report_lines(plan, "cpu"))
    assert "growth at 7 steps: stack x2, 4 -> 8 layers, moments reset, learning rate restart" in text
    assert "until step 7: 1,792 tokens" in text
    assert "at most 5,120 tokens" in text
    assert "upper bounds" in text
    assert "ranks at 4 layers" in text
    assert "ranks at 8 layers" in text
    assert "the last one has the weights only" in text
    lines = {line.strip() for line in text.splitlines()}
    assert {line.strip() for line in plan.describe("cpu")[2:]} <= lines, "the short plan says something else"


def test_report_of_parameter_groups() -> None:
    groups = '[{pattern = "layers.0.*", frozen = true}, {pattern = "*wq.weight", lr_factor = 0.5}]'
    plan = plan_of({**BASE, "optimizer.weight_decay_on": "matrices", "optimizer.groups": groups}, 1)
    lines = report_lines(plan, "cpu")
    start = next(number for number, line in enumerate(lines) if line.startswith("parameter groups"))
    block = lines[start : lines.index("", start)]
    assert block[0] == "parameter groups (lr 0.01, weight decay 0.1):"
    assert [line.split(":")[0].strip() for line in block[1:]] == [
        "lr x 1, weight decay x 0",
        "frozen",
        "lr x 0.5, weight decay x 1",
        "lr x 1, weight decay x 1",
    ]
    assert "3,072 parameters in 3 tensors: attention.wq.weight" in block[3]
    assert "tok_embeddings.weight, attention_norm.weight, ffn_norm.weight, norm.weight" in block[1]
    counts = [int(line.split(": ")[1].split(" ")[0].replace(",", "")) for line in block[1:]]
    assert sum(counts) == plan.target.num_params
    assert not [line for line in report_lines(plan_of(BASE, 1), "cpu") if "parameter groups" in line]


def test_bytes_of_a_rank_follow_the_type() -> None:
    """16 bytes a parameter in float32, 8 in bfloat16: weight, gradient, two moments."""
    values = {**BASE, "model.dim": 512, "model.hidden_dim": 1024}
    for dtype, size in (("float32", 16), ("bfloat16", 8)):
        plan = plan_of({**values, "training.dtype": dtype, "training.mixed_precision_param": "bfloat16"}, 1)
        text = "\n".join(report_lines(plan, "cpu"))
        assert f"largest: {size * plan.target.num_params / 2**30:,.3f} GiB" in text
        assert f"GiB of {dtype} on the ranks" in text


@pytest.mark.parametrize(("dtype", "size", "note"), [("float32", 20, ""), ("bfloat16", 12, "; ema of float32")])
def test_an_average_takes_4_bytes_of_each_parameter(dtype: str, size: int, note: str) -> None:
    """In memory and in checkpoints, also in those without moments."""
    values = {**BASE, "model.dim": 512, "model.hidden_dim": 1024, "training.dtype": dtype}
    values |= {"training.mixed_precision_param": "bfloat16", "averages.ema_decay": 0.75, "checkpoint.enable": True}
    plan = plan_of({**values, "checkpoint.last_save_model_only": True}, 2)
    lines = report_lines(plan, "cpu")
    text = "\n".join(lines)
    numel = plan.target.num_params
    assert "  ema: decay 0.75 a step, half-life 2.4 steps, in float32" in lines
    assert f"GiB of {dtype} on the ranks that hold most{note}):" in text
    assert f"largest: {size * numel / 2 / 2**30:,.3f} GiB" in text
    header = next(line.split() for line in lines if line.strip().startswith("pp"))
    assert header[-3:] == ["moments", "ema", "sum"]
    moments = (size - 4) // 4 * 2
    assert (
        f"checkpoints: {(size - moments // 2) * numel / 2**30:,.3f} GiB each on disk (weights, ema and moments)" in text
    )
    assert (
        f"the last one has the weights, ema only: {(size - 4) // 4 * numel / 2**30 + 4 * numel / 2**30:,.3f} GiB"
        in text
    )


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["plan", "--training.dataset_path", "nowhere", "--model.hf_assets_path", "nowhere"]) == 0
    assert "dp_shard 4 = 4 ranks" in capsys.readouterr().out
    assert main(["plan", "--world-size=6", "--device=cpu", "--parallelism.tensor_parallel_degree", "2"]) == 0
    assert "dp_shard 3 x tp 2 = 6 ranks" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_all_problems_together(capsys: Any) -> None:
    words = ["--model.flavour", "8B", "--parallelism.tensor_parallel_degree", "3", "--optimizer.lr", "-1"]
    assert main(["plan", "--world-size", "6", *words, "--compile.backend", "eager"]) == 2
    output = capsys.readouterr()
    assert not output.out
    for expected in (
        "error: model.flavour: unknown key in [model] (--model.flavour). Did you mean",
        "error: optimizer.lr: must be greater than 0, got -1",
        "error: parallelism.tensor_parallel_degree: 3 does not divide the model's 16 query heads",
        "warning: compile.backend: has no effect because compile.enable is false",
    ):
        assert expected in output.err
    assert "nothing was started" in output.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--world-size", "many"],
            "error: --world-size or WORLD_SIZE: expected a number of ranks, at least 1, got 'many'",
        ),
        (["--world-size=0"], "error: --world-size or WORLD_SIZE: expected a number of ranks, at least 1, got '0'"),
        (["--world-size"], "error: --world-size or WORLD_SIZE: expected a number of ranks, at least 1, got ''"),
        (["--device", "tpu"], "error: --device: must be one of cuda, cpu, got 'tpu'"),
        (["--job.config_file", "nowhere.toml"], "error: job.config_file nowhere.toml: no such file"),
        (["--world-size", "6", "--parallelism.tensor_parallel_degree", "4"], "4 does not divide the 6 ranks"),
        (
            ["--optimizer.groups", '[{pattern = "*norm", lr_factor = 2.0}]'],
            "optimizer.groups.0.pattern: no parameter of the model is called '*norm', or an earlier group has all that",
        ),
        (["--optimizer.groups", '[{pattern = "*", frozen = true}]'], "optimizer.groups: freezes every parameter"),
        (["--optimizer.groups", '[{pattern = "*", lr_factor = 0.0}]'], "optimizer.groups: freezes every parameter"),
        (["--optimizer.groups", '[{pattern = "*"}]'], "optimizer.groups.0: changes nothing"),
        (
            ["--optimizer.groups", '[{pattern = "*", frozen = true, lr_factor = 2.0}]'],
            "optimizer.groups.0: is frozen, so lr_factor and weight_decay_factor have no meaning",
        ),
        (["--device", "cpu", "--profiling.enable_memory_snapshot"], "memory snapshots exist on CUDA only"),
        (
            ["--growth.stages", '[{at = "3 steps", factor = 2, seq_len = 262144}]', "--checkpoint.enable"],
            "error: growth.stages.0.seq_len: 262144 is more than model.max_seq_len = 131072. Shorten it",
        ),
        (["--job.dump_folder", f"{__file__}/run"], f"{__file__} is a file. Remove it, or name another folder"),
    ],
)
def test_a_problem_is_said_in_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 - ("is a file" in message)
    assert message in lines[0]


def test_a_growth_whose_time_is_wrong_is_checked_all_the_same(capsys: Any) -> None:
    """Its operator is not known either; and nothing is said of the time that stood in for its own."""
    words = ["--checkpoint.enable", "--growth.stages", '[{at = "3 stps", operator = "stac", factor = 2}]']
    assert main(["plan", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == ["growth.stages.0.at", "growth.stages.0.operator"]
    stages = '[{at = "3 stps", factor = 2}, {at = "5 steps", factor = 2}, {at = "4 stps", factor = 2}]'
    assert main(["plan", "--checkpoint.enable", "--model.n_layers=8", "--growth.stages", stages]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == ["growth.stages.0.at", "growth.stages.2.at"]


def test_what_this_machine_lacks_is_only_warned_about(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["plan", "--metrics.enable_wandb"]) == 0
    assert "warning: metrics.enable_wandb: needs the package wandb" in capsys.readouterr().err
    recipe = inspect_recipe(["--metrics.enable_wandb"], Findings())
    assert recipe is not None
    plan_module.plan_run(recipe, found := Findings(), num_ranks=1, device_type="cuda")
    assert [problem.key for problem in found.problems] == ["metrics.enable_wandb"]


def test_a_dry_run_is_planned_as_what_it_is(capsys: Any) -> None:
    """One step that does not grow, whatever the recipe has besides."""
    words = argv_of({**growing("7 steps"), "training.steps": 5, "comm.mode": "fake_backend"})
    assert main(["plan", *words, "--world-size", "4"]) == 0
    output = capsys.readouterr().out
    assert "run: 1 step, 256 tokens" in output
    assert "growth" not in output
    assert "checkpoints: none are saved" in output


def test_a_pipeline_is_shown_at_every_depth(capsys: Any) -> None:
    words = argv_of({**growing("7 steps"), "parallelism.pipeline_parallel_degree": 2})
    assert main(["plan", *words, "--world-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  schedule 1F1B, 2 microbatches of 1 sequence in each accumulation step" in lines
    assert "  pp 1: part 1 (layers 2-3, norm, output)" in lines
    assert "  pp 1: part 1 (layers 4-7, norm, output)" in lines
    assert [line.split()[1] for line in lines if line.startswith(("   0 ", "   1 "))] == ["0-1", "2-3"] * 2


def test_help(capsys: Any) -> None:
    assert main(["plan", "--help"]) == 0
    assert "--world-size" in capsys.readouterr().out
    assert main(["launch", "--help"]) == 0
    assert "NGPU" in (text := capsys.readouterr().out)
    assert "train --help lists every key" in text
    assert main([]) == 0
    assert "\n  plan " in capsys.readouterr().out


def test_the_help_names_every_flavor() -> None:
    """It is plain text, because the families import torch."""
    text = ModelConfig.model_fields["flavor"].description or ""
    for family in FAMILIES:
        listed = re.search(rf"{family}: ([^:]*)\.(?: |$)", " ".join(text.split()))
        assert listed is not None, family
        assert listed[1].split(", ") == [one for one in family_module(family).FLAVORS if one != "custom"]


@pytest.mark.slow  # its plan is compared with a golden one by default
def test_405b_on_512_ranks_takes_seconds() -> None:
    """As a user starts it, with all imports; in CPU seconds, which other processes do not lengthen much."""
    recipe = ROOT / "train_configs" / "llama3_405b.toml"
    words = ["plan", "--world-size", "512", "--job.config_file", str(recipe)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "titan_growth", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "405,853,388,800" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
