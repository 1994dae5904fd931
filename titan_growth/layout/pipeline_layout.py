"""Which layers each pipeline rank holds and in what order it computes them, planned without devices.

A pipeline splits the model into *parts* (PyTorch: stages) of consecutive layers. The first part also has the embedding,
the last one the norm and the head. A pp rank holds one part, or several under schedules that reduce idle time by
interleaving parts. A batch is split into *microbatches*, so that all ranks work at the same time; a *schedule* is the
order in which each rank runs the forwards and backwards of its parts.

Placement is normally a loop, part p on rank p % pp. The two V-shaped schedules turn around at the last rank, so rank 0
holds the first and the last part. With 4 ranks and 8 parts:

    loop  rank 0: 0 4   rank 1: 1 5   rank 2: 2 6   rank 3: 3 7
    V     rank 0: 0 7   rank 1: 1 6   rank 2: 2 5   rank 3: 3 4

This module is arithmetic on a recipe and must not import torch: a plan for 405B parameters prints at once, on a laptop.
It accepts the numbers of microbatches that PyTorch's schedules accept; tests compare the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.layout.pipeline_parts import LAYERS_PER_PART, NAMES, Part, cut_by_name, cut_evenly
from titan_growth.layout.schedule_csv import KEY as CSV_KEY
from titan_growth.layout.schedule_csv import Action, read_schedule_csv
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many

CSV = "csv"
"""The name of a schedule read from a file."""

_DEGREE = "parallelism.pipeline_parallel_degree"
_SCHEDULE = "parallelism.pipeline_parallel_schedule"
_MICROBATCH_SIZE = "parallelism.pipeline_parallel_microbatch_size"


@dataclass(frozen=True)
class ScheduleConditions:
    """What a schedule requires of the rest of a run."""

    splits_backward: bool = False
    """Runs the backward for inputs and for weights at different times. FSDP must then not reshard after the forward,
    and neither compile nor per-op selective activation checkpointing works."""
    v_shaped: bool = False
    """Adjacent parts share a rank and pass activations without communication; PyTorch's `eval` then fails."""
    single: bool = False
    """Takes exactly one part per rank; its class then takes no list."""


SCHEDULES = {
    "GPipe": ScheduleConditions(single=True),
    "1F1B": ScheduleConditions(single=True),
    "Interleaved1F1B": ScheduleConditions(),
    "LoopedBFS": ScheduleConditions(),
    "InterleavedZeroBubble": ScheduleConditions(splits_backward=True),
    "ZBVZeroBubble": ScheduleConditions(splits_backward=True, v_shaped=True),
    "DualPipeV": ScheduleConditions(splits_backward=True, v_shaped=True),
}
"""PyTorch's schedules, by their names in `get_schedule_class`."""


@dataclass(frozen=True)
class PipelineLayout:
    """The parts of a model at one depth, their ranks, and the schedule."""

    schedule: str
    """PyTorch's name in PyTorch's spelling, or `csv`."""
    parts: tuple[Part, ...]
    """In model order."""
    rank_of_part: tuple[int, ...]
    """The pp rank of each part."""
    num_microbatches: int
    """Per rank and gradient accumulation step."""
    order: tuple[tuple[Action, ...], ...] = ()
    """The actions of each pp rank if the schedule is `csv`; build the schedule from these, not from the file."""

    def parts_of(self, pp_rank: int) -> tuple[Part, ...]:
        """The parts that a pp rank holds, in model order."""
        return tuple(part for part in self.parts if self.rank_of_part[part.index] == pp_rank)

    @property
    def first_rank(self) -> int:
        """The pp rank that holds the embedding and gets the batch."""
        return self.rank_of_part[0]

    @property
    def last_rank(self) -> int:
        """The pp rank that holds the head and has the loss."""
        return self.rank_of_part[-1]

    @property
    def conditions(self) -> ScheduleConditions:
        """What the schedule requires of the run; for a file it follows from the actions."""
        if self.schedule != CSV:
            return SCHEDULES[self.schedule]
        splits = any(action.kind in "IW" for actions in self.order for action in actions)
        neighbours = zip(self.rank_of_part, self.rank_of_part[1:], strict=False)
        return ScheduleConditions(splits_backward=splits, v_shaped=any(rank == after for rank, after in neighbours))


def plan_pipeline(
    section: ParallelismConfig, num_layers: int, local_batch_size: int, found: Findings
) -> PipelineLayout | None:
    """The pipeline of a model at one depth, or None if its settings have problems.

    Args:
        section: the `[parallelism]` table, with a pipeline degree above 1.
        num_layers: of the model. A run that grows plans every depth.
        local_batch_size: sequences per data-parallel rank and forward-backward.
        found: also gets warnings about settings that are unwise or have no effect.
    """
    assert section.pipeline_parallel_degree > 1, "without a pipeline there is nothing to lay out"
    own = Findings()
    num_microbatches = _count_microbatches(local_batch_size, section.pipeline_parallel_microbatch_size, own)
    lay_out = _as_in_file if section.pipeline_parallel_schedule_csv else _by_name
    layout = lay_out(section, num_layers, num_microbatches, own)
    if layout is not None and not own.problems:
        _warn_of_unused(section, own)
        _warn_of_idle_ranks(section, layout, local_batch_size, own)
    found.extend(own)
    return None if own.problems else layout


def _as_in_file(
    section: ParallelismConfig, num_layers: int, num_microbatches: int | None, found: Findings
) -> PipelineLayout | None:
    """The layout of a schedule file."""
    path, size = section.pipeline_parallel_schedule_csv, section.pipeline_parallel_microbatch_size
    assert path is not None
    file = read_schedule_csv(path, section.pipeline_parallel_degree, found)
    if file is None:
        return None
    expected = file.num_microbatches
    if num_microbatches not in (None, expected):
        message = (
            f"{path} has {many(expected, 'microbatch')}, but training.local_batch_size {num_microbatches * size} "
            f"in microbatches of {size} makes {num_microbatches}"
        )
        found.problem(CSV_KEY, message, f"A training.local_batch_size of {expected * size} would fit")
    parts = _cut(section, num_layers, CSV, len(file.rank_of_part), found)
    return None if parts is None else PipelineLayout(CSV, parts, file.rank_of_part, expected, file.order)


def _by_name(
    section: ParallelismConfig, num_layers: int, num_microbatches: int | None, found: Findings
) -> PipelineLayout | None:
    """The layout of one of PyTorch's schedules."""
    pp, size = section.pipeline_parallel_degree, section.pipeline_parallel_microbatch_size
    schedule = _resolve_schedule(section.pipeline_parallel_schedule, found)
    parts = _cut(section, num_layers, schedule, None, found) if schedule is not None else None
    if schedule is None or parts is None or num_microbatches is None:
        return None
    _check_microbatches(schedule, pp, len(parts), num_microbatches * size, size, found)
    turns_at = pp if SCHEDULES[schedule].v_shaped else len(parts)
    placement = tuple(part % pp if part < turns_at else 2 * pp - 1 - part for part in range(len(parts)))
    return PipelineLayout(schedule, parts, placement, num_microbatches)


def part_table(layout: PipelineLayout) -> list[str]:
    """A plan's line per pp rank, such as `pp 0: part 0 (tok_embeddings, layers 0-3), part 4 (layers 15-17)`."""
    held = [layout.parts_of(rank) for rank in range(1 + max(layout.rank_of_part))]
    described = [", ".join(f"part {part.index} ({part.describe()})" for part in parts) for parts in held]
    return [f"pp {rank}: {parts}" for rank, parts in enumerate(described)]


def _resolve_schedule(name: str, found: Findings) -> str | None:
    """The name of a schedule in PyTorch's spelling, from any case."""
    spellings = {schedule.lower(): schedule for schedule in SCHEDULES}
    if name.lower() in spellings:
        return spellings[name.lower()]
    known = ", ".join(SCHEDULES)
    if name.lower() in ("pipelineschedulesingle", "pipelineschedulemulti"):
        message = f"{name} is only the base class of schedules and cannot run itself"
        found.problem(_SCHEDULE, message, f"Choose one of {known}")
    else:
        message = f"unknown schedule {name!r}; the schedules are {known}"
        found.problem(_SCHEDULE, message, suggestion(name, SCHEDULES))
    return None


def _warn_of_idle_ranks(section: ParallelismConfig, layout: PipelineLayout, batch: int, found: Findings) -> None:
    """Fewer microbatches than parts."""
    num_parts = len(layout.parts)
    if layout.num_microbatches < num_parts:
        message = (
            f"{batch} makes {many(layout.num_microbatches, 'microbatch')} for {num_parts} pipeline parts; "
            "with fewer microbatches than parts, ranks wait for each other most of the time"
        )
        least = num_parts * section.pipeline_parallel_microbatch_size
        found.warn("training.local_batch_size", message, f"{least} would be the least for {num_parts} microbatches")


def _warn_of_unused(section: ParallelismConfig, found: Findings) -> None:
    """Settings that others override."""
    # 1F1B is the default, so next to a file it was most likely not set.
    if section.pipeline_parallel_schedule_csv and section.pipeline_parallel_schedule.lower() != "1f1b":
        message = f"{section.pipeline_parallel_schedule} is not used: {CSV_KEY} is the schedule"
        found.warn(_SCHEDULE, message)
    if section.module_fqns_per_model_part is not None and section.pipeline_parallel_layers_per_stage is not None:
        found.warn(LAYERS_PER_PART, f"is not used: {NAMES} is the split")


# Microbatches.


def _count_microbatches(batch: int, size: int, found: Findings) -> int | None:
    if batch % size == 0:
        return batch // size
    message = f"{size} does not divide training.local_batch_size {batch}"
    found.problem(_MICROBATCH_SIZE, message, f"{math.gcd(size, batch)} would fit")
    return None


def _check_microbatches(schedule: str, pp: int, num_parts: int, batch: int, size: int, found: Findings) -> None:
    """Why PyTorch's schedule class would refuse the number of microbatches."""
    number = batch // size
    rounds = max(1, number // pp)
    if schedule in ("1F1B", "DualPipeV") and number < num_parts:
        reason = f"{schedule} needs at least as many as parts, {num_parts}"
        hint = f"{num_parts * size} would fit"
    elif schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and number % rounds:
        reason = f"{schedule} takes them in {rounds} equal rounds ({number} // pp {pp})"
        hint = f"{rounds * pp * size} or {(rounds + 1) * pp * size} would fit"
    else:
        return
    with_one = Findings()
    if size > 1:
        _check_microbatches(schedule, pp, num_parts, batch, 1, with_one)
        hint += "" if with_one.problems else f", and so would {_MICROBATCH_SIZE} 1"
    message = f"{batch} makes {many(number, 'microbatch')} of {size}, but {reason}"
    found.problem("training.local_batch_size", message, hint)


# Parts.


class _Wanted(NamedTuple):
    """The numbers of parts a schedule accepts: those nearest to a given one, and the rule in words."""

    numbers: set[int]
    text: str


def _wanted_parts(schedule: str, pp: int, num_parts: int, in_file: int | None) -> _Wanted:
    if in_file is not None:
        return _Wanted({in_file}, f"{CSV_KEY} has {in_file}")
    if SCHEDULES[schedule].single:
        return _Wanted({pp}, f"{schedule} takes exactly one part per rank, {pp}")
    if SCHEDULES[schedule].v_shaped:
        return _Wanted({2 * pp}, f"{schedule} takes exactly two parts per rank, {2 * pp}")
    nearest = {max(2, num_parts // pp) * pp, max(2, -(-num_parts // pp)) * pp}
    return _Wanted(nearest, f"{schedule} takes two or more parts per rank, a multiple of {pp} from {2 * pp} on")


def _cut(
    section: ParallelismConfig, num_layers: int, schedule: str, in_file: int | None, found: Findings
) -> tuple[Part, ...] | None:
    """The parts, by name or by an even split; `in_file` is the number of parts in a schedule file."""
    pp = section.pipeline_parallel_degree
    names, layers_per_part = section.module_fqns_per_model_part, section.pipeline_parallel_layers_per_stage
    if names is not None:
        wanted = _wanted_parts(schedule, pp, len(names), in_file)
        if len(names) not in wanted.numbers:
            found.problem(NAMES, f"has {many(len(names), 'part')}, but {wanted.text}")
            return None
        return cut_by_name(names, num_layers, found)
    if layers_per_part is None:
        num_parts = in_file or pp * (1 if SCHEDULES[schedule].single else 2)
        return cut_evenly(section, num_layers, num_parts, CSV_KEY if in_file else _DEGREE, found)
    less = section.pipeline_parallel_first_stage_less_layers + section.pipeline_parallel_last_stage_less_layers
    num_parts = -(-(num_layers + less) // layers_per_part)
    wanted = _wanted_parts(schedule, pp, num_parts, in_file)
    if num_parts not in wanted.numbers:
        made = f"{layers_per_part} makes {many(num_parts, 'part')} of {num_layers} layers + {less} less_layers"
        sizes = {parts: -(-(num_layers + less) // parts) for parts in wanted.numbers}
        fits = sorted(size for parts, size in sizes.items() if -(-(num_layers + less) // size) == parts)
        hint = f"{' or '.join(map(str, fits))} would fit" if fits else "Leave it out"
        found.problem(LAYERS_PER_PART, f"{made}, but {wanted.text}", hint)
        return None
    return cut_evenly(section, num_layers, num_parts, LAYERS_PER_PART, found)
