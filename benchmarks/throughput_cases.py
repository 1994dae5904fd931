"""What `throughput.py` measures: model sizes, and the cases that add one technique at a time to a baseline.

A case is a recipe: the words of its size, then its own. All cases of a size train the same model on the same global
batches, whatever the mesh, so their speeds can be compared and their losses must agree. Cases come in groups on equally
many ranks; the first of a group is its baseline. Whether a case is possible is left to the plan, as for any run.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.layout.mesh_shape import resolve_mesh
from titan_growth.layout.pipeline_layout import SCHEDULES
from titan_growth.run.plan import RunPlan, plan_run
from titan_growth.tools.findings import Findings

ROOT = Path(__file__).resolve().parents[1]

COMMON = (
    *("--growth.enable", "false", "--checkpoint.enable", "false", "--validation.enable", "false"),
    *("--metrics.enable_tensorboard", "false", "--debug.seed", "1"),
    # Long enough a schedule and short enough a warmup for the loss to fall within the few steps of a measurement.
    *("--training.steps", "1000", "--lr_scheduler.warmup_steps", "5"),
)


@dataclass(frozen=True)
class Size:
    """A recipe to start from. Cases change its mesh and techniques, never its model, batch or data."""

    name: str
    words: tuple[str, ...]
    steps: int
    """Steps in one timed stretch, unless --steps says otherwise."""
    everything: bool = True
    """Whether pipeline schedules and 3D meshes are part of the default sweep on a CPU."""


SIZES = {
    "small": Size(
        "small",
        (
            *("--job.config_file", "train_configs/debug_model.toml"),
            *("--training.global_batch_size", "8", "--training.local_batch_size", "8"),
            *("--parallelism.pipeline_parallel_microbatch_size", "2"),
        ),
        steps=2,
    ),
    "large": Size(
        "large",
        (
            *("--model.flavor", "debugmodel_wide", "--model.n_kv_heads", "8", "--optimizer.lr", "1e-3"),
            *("--training.seq_len", "512", "--training.global_batch_size", "4", "--training.local_batch_size", "4"),
            *("--activation_checkpoint.mode", "none"),
        ),
        steps=1,
        everything=False,  # a step takes seconds: the whole sweep is to end within a quarter of an hour
    ),
}


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    size: Size
    group: str
    name: str
    ranks: int
    words: tuple[str, ...] = ()
    adds_to: str = ""
    """The case that this one adds a technique to; empty = the group's baseline."""

    @property
    def title(self) -> str:
        """Size, group and name, for people."""
        return f"{self.size.name} / {self.group} / {self.name}"


def size_of(name: str) -> Size:
    """A named size, or a recipe file."""
    if name in SIZES:
        return SIZES[name]
    return Size(Path(name).stem, ("--job.config_file", name), steps=3)


# ---- the default sweep -----------------------------------------------------------------------------------------------

FP32 = ("--training.mixed_precision_param", "float32")
COMPILE = ("--compile.enable", "true")
FLOAT8 = ("--model.converters", "quantize.linear.float8", "--quantize.linear.float8.filter_fqns", "output")


def checkpointing(mode: str, option: str = "2") -> tuple[str, ...]:
    """Words that switch activation checkpointing to a mode."""
    words = ("--activation_checkpoint.mode", mode)
    return (*words, "--activation_checkpoint.selective_ac_option", option) if mode == "selective" else words


def mesh(**degrees: int) -> tuple[str, ...]:
    """Words for a mesh such as `mesh(pp=2, tp=2)`; the ranks that are left are FSDP's."""
    keys = {
        "pp": "pipeline_parallel_degree",
        "dp_replicate": "data_parallel_replicate_degree",
        "cp": "context_parallel_degree",
        "tp": "tensor_parallel_degree",
    }
    return tuple(word for axis, n in degrees.items() for word in (f"--parallelism.{keys[axis]}", str(n)))


def default_cases(size: Size, ranks: int, device_type: str, cores: int) -> list[Case]:
    """The cases of a size on a number of ranks."""
    if ranks == 1:
        return _one_rank(size)
    if device_type == "cpu" and ranks > cores:
        # Says nothing about speed, so it is kept to what no smaller number of ranks can show, and short.
        size = replace(size, steps=1)
        return [case for case in _meshes(size, ranks, device_type)[:1] + _three_axes(size, ranks) if size.everything]
    schedules = _schedules(size, ranks) if size.everything or device_type != "cpu" else []
    return _meshes(size, ranks, device_type) + _three_axes(size, ranks) + schedules


def _one_rank(size: Size) -> list[Case]:
    added = {
        "AC full": checkpointing("full"),
        "AC every 2nd": checkpointing("selective", "2"),
        "AC op": checkpointing("selective", "op"),
        "compile": COMPILE,
        "chunked loss": ("--training.loss_chunk_tokens", "512"),
        "Float8": FLOAT8,
    }
    cases = [Case(size, "1 rank", "plain fp32", 1, FP32), Case(size, "1 rank", "bf16", 1)]
    return cases + [Case(size, "1 rank", f"bf16 + {name}", 1, words, "bf16") for name, words in added.items()]


def _on(ranks: int, *degrees: tuple[str, int]) -> str:
    """`pp 2 x fsdp 4` for a mesh of 8 ranks with ("pp", 2)."""
    left = ranks // math.prod(degree for _, degree in degrees)
    return " x ".join([f"{axis} {degree}" for axis, degree in degrees] + ([f"fsdp {left}"] if left > 1 else []))


def _meshes(size: Size, ranks: int, device_type: str) -> list[Case]:
    """FSDP, which is the baseline; one other axis at a time; one technique at a time on FSDP."""
    group = f"{ranks} ranks"
    fsdp = f"fsdp {ranks}"
    named: dict[str, tuple[str, ...]] = {
        fsdp: (),
        f"ddp {ranks}": (*mesh(dp_replicate=ranks), "--parallelism.data_parallel_shard_degree", "1"),
    }
    if ranks % 2 == 0:
        named |= {_on(ranks, (axis, 2)): mesh(**{axis: 2}) for axis in ("tp", "pp", "cp")}
    if ranks % 2 == 0 and ranks > 2:
        named[f"hsdp 2 x {ranks // 2}"] = mesh(dp_replicate=2)
    named |= {f"{fsdp} + AC full": checkpointing("full"), f"{fsdp} + compile": COMPILE}
    if device_type != "cpu":  # where time is short, one rank shows these; and on a CPU Float8 is emulated
        named[f"{fsdp} + AC op"] = checkpointing("selective", "op")
        named[f"{fsdp} + compile + Float8"] = (*COMPILE, *FLOAT8)
    adds_to = {f"{fsdp} + compile + Float8": f"{fsdp} + compile"}
    return [Case(size, group, name, ranks, words, adds_to.get(name, "")) for name, words in named.items()]


def _three_axes(size: Size, ranks: int) -> list[Case]:
    if ranks % 8:
        return []
    return [Case(size, f"{ranks} ranks", f"pp 2 x fsdp {ranks // 4} x tp 2", ranks, mesh(pp=2, tp=2))]


def _schedules(size: Size, ranks: int) -> list[Case]:
    """Every schedule on two pipeline ranks, beside the FSDP that all of them have to beat."""
    if ranks % 2:
        return []
    group = f"{ranks} ranks, pipeline schedules"
    where = _on(ranks, ("pp", 2))
    cases = [Case(size, group, f"fsdp {ranks}", ranks)]
    for schedule in SCHEDULES:
        words = (*mesh(pp=2), "--parallelism.pipeline_parallel_schedule", schedule)
        cases.append(Case(size, group, f"{where} {schedule}", ranks, words))
    return cases


# ---- other sweeps ----------------------------------------------------------------------------------------------------


def custom_cases(size: Size, texts: Iterable[str], ranks: int | None) -> list[Case]:
    """Cases of `--case "name=--section.key value ..."`, each group with its baseline.

    Args:
        ranks: of the process group that there is; None starts as many as a case's degrees come to.

    Raises:
        ValueError: for a text without a name.
    """
    cases: list[Case] = []
    for text in texts:
        name, is_given, rest = text.partition("=")
        if not name or not is_given or name.startswith("--"):
            raise ValueError(f"--case {text!r}: expected name=--section.key value ...")
        words = tuple(shlex.split(rest))
        number = ranks or _ranks_wanted((*size.words, *words))
        cases.append(Case(size, _ranks_text(number), name, number, words))
    # A Python sort is stable: cases on equally many ranks stay in the order they were given in.
    ordered: list[Case] = []
    for case in sorted(cases, key=lambda case: case.ranks):
        if not ordered or ordered[-1].ranks != case.ranks:
            baseline = "baseline" if case.ranks == 1 else f"fsdp {case.ranks}"
            ordered.append(Case(size, case.group, baseline, case.ranks))
        ordered.append(case)
    return ordered


def _ranks_text(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _ranks_wanted(words: tuple[str, ...]) -> int:
    recipe = inspect_recipe(_found(words), Findings())
    if recipe is None:
        return 1  # planning it will say what is wrong
    section = recipe.parallelism
    return (
        section.pipeline_parallel_degree
        * section.data_parallel_replicate_degree
        * max(1, section.data_parallel_shard_degree)
        * section.context_parallel_degree
        * section.tensor_parallel_degree
    )


def selected(cases: Iterable[Case], parts: list[str]) -> list[Case]:
    """The cases with one of these in their titles, and the baselines and intermediate cases they are compared with."""
    cases = list(cases)
    wanted = {case for case in cases if any(part.lower() in case.title.lower() for part in parts)}
    for group in groups_of(cases):
        if any(case in wanted for case in group):
            names = {case.adds_to for case in group if case in wanted} | {group[0].name}
            wanted |= {case for case in group if case.name in names}
    return [case for case in cases if case in wanted]


def groups_of(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Cases that are measured in turns, in their order; the first is the baseline."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.size.name, case.group), []).append(case)
    yield from groups.values()


# ---- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedCase:
    """A case with what the trainer makes of it: a plan, or the reasons why there is none."""

    case: Case
    words: tuple[str, ...]
    plan: RunPlan | None
    reasons: tuple[str, ...]


def plan_case(case: Case, device_type: str) -> PlannedCase:
    """The plan of a case, made as for any run."""
    words = (*COMMON, *case.size.words, *case.words)
    recipe = inspect_recipe(_found(words), found := Findings())
    plan = None
    if recipe is not None and not found.problems:
        words = (*words, *_batch_words(recipe, case))
        recipe = inspect_recipe(_found(words), found := Findings())
    if recipe is not None and not found.problems:
        plan = plan_run(recipe, found, num_ranks=case.ranks, device_type=device_type)
    return PlannedCase(case, words, plan, tuple(str(problem) for problem in found.problems))


def _batch_words(recipe: Recipe, case: Case) -> tuple[str, ...]:
    """The size's global batch on this mesh. A pipeline takes its share of it at once, to have many microbatches."""
    keys = ("--training.global_batch_size", "--training.local_batch_size")
    shape = resolve_mesh(recipe.parallelism, case.ranks, Findings())
    if shape is None or any(word.startswith(keys) for word in case.words):
        return ()  # the plan will say what is wrong; or the case decides for itself
    training = recipe.training
    whole = training.global_batch_size
    if whole == -1:
        whole = training.local_batch_size * case.ranks
    if whole % shape.dp_degree:
        return (keys[0], str(whole))
    share = whole // shape.dp_degree
    local = share if shape.pp > 1 else math.gcd(share, training.local_batch_size)
    return (keys[0], str(whole), keys[1], str(local))


def _found(words: tuple[str, ...]) -> list[str]:
    """The words with a recipe file that is not found from here taken from the checkout, as run_train.sh does."""
    found = list(words)
    for position, word in enumerate(found[1:], start=1):
        if found[position - 1] == "--job.config_file" and not Path(word).is_file() and (ROOT / word).is_file():
            found[position] = str(ROOT / word)
    return found


def with_steps(cases: Iterable[Case], steps: int | None) -> list[Case]:
    """The cases with another number of steps in a timed stretch."""
    return [case if steps is None else replace(case, size=replace(case.size, steps=steps)) for case in cases]
