"""Which layers each pipeline rank holds and in what order it works on them, decided without devices.

A pipeline cuts the model into *parts* (PyTorch says stages): chunks of consecutive layers. The first part has the
embedding too, the last one the norm and the head. Every rank of the pp axis holds one part, or several for schedules
that keep ranks busier by switching between parts. A batch goes through in *microbatches*, so that all ranks have work
at the same time; a *schedule* is the order in which each rank does the forwards and backwards of its parts.

Where parts lie: normally in a loop, part p on rank p % pp. The two V-shaped schedules turn around at the last rank, so
rank 0 holds the first part and the last one. With 4 ranks and 8 parts:

    loop  rank 0: 0 4   rank 1: 1 5   rank 2: 2 6   rank 3: 3 7
    V     rank 0: 0 7   rank 1: 1 6   rank 2: 2 5   rank 3: 3 4

This module is arithmetic on a recipe. It must not import torch: a plan for 405B parameters is printed at once, on a
laptop. The numbers of microbatches that it takes for a schedule are those that PyTorch takes (the tests ask it).
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
"""The name of a schedule that was read from a file."""

_DEGREE = "parallelism.pipeline_parallel_degree"
_SCHEDULE = "parallelism.pipeline_parallel_schedule"
_MICROBATCH_SIZE = "parallelism.pipeline_parallel_microbatch_size"


@dataclass(frozen=True)
class ScheduleConditions:
    """What a schedule asks of the rest of a run."""

    splits_backward: bool = False
    """Does the backward for inputs and for weights at different times. Then FSDP must not reshard after the forward,
    and neither compile nor selective activation checkpointing per operation works."""
    v_shaped: bool = False
    """Neighbouring parts share a rank, and hand activations over without communication; PyTorch's `eval` fails then."""
    single: bool = False
    """Takes exactly one part a rank."""


SCHEDULES = {
    "GPipe": ScheduleConditions(single=True),
    "1F1B": ScheduleConditions(single=True),
    "Interleaved1F1B": ScheduleConditions(),
    "LoopedBFS": ScheduleConditions(),
    "InterleavedZeroBubble": ScheduleConditions(splits_backward=True),
    "ZBVZeroBubble": ScheduleConditions(splits_backward=True, v_shaped=True),
    "DualPipeV": ScheduleConditions(splits_backward=True, v_shaped=True),
}
"""PyTorch's schedules by the names that its `get_schedule_class` knows."""


@dataclass(frozen=True)
class PipelineLayout:
    """The parts of a model of one depth, their ranks, and the schedule."""

    schedule: str
    """PyTorch's name in its own spelling, or `csv`."""
    parts: tuple[Part, ...]
    """In model order."""
    rank_of_part: tuple[int, ...]
    """The pp rank of each part."""
    num_microbatches: int
    """Per rank and forward-backward, that is per gradient accumulation step."""
    order: tuple[tuple[Action, ...], ...] = ()
    """The actions of each pp rank, when the schedule is `csv`; make the schedule from these, not from the file."""

    def parts_of(self, pp_rank: int) -> tuple[Part, ...]:
        """The parts that a rank of the pp axis holds, in model order."""
        return tuple(part for part in self.parts if self.rank_of_part[part.index] == pp_rank)

    @property
    def first_rank(self) -> int:
        """The pp rank that holds the embedding and is fed the batch."""
        return self.rank_of_part[0]

    @property
    def last_rank(self) -> int:
        """The pp rank that holds the head and knows the loss."""
        return self.rank_of_part[-1]

    @property
    def is_single(self) -> bool:
        """Whether the schedule takes exactly one part a rank (GPipe, 1F1B); its class wants no list then."""
        return self.conditions.single

    @property
    def conditions(self) -> ScheduleConditions:
        """What the schedule asks of the rest of the run; that of a file follows from its actions."""
        if self.schedule != CSV:
            return SCHEDULES[self.schedule]
        splits = any(action.kind in "IW" for actions in self.order for action in actions)
        neighbours = zip(self.rank_of_part, self.rank_of_part[1:], strict=False)
        return ScheduleConditions(splits_backward=splits, v_shaped=any(rank == after for rank, after in neighbours))


def plan_pipeline(
    section: ParallelismConfig, num_layers: int, local_batch_size: int, found: Findings
) -> PipelineLayout | None:
    """The pipeline of a model of one depth, or None when something is wrong with its settings.

    Args:
        section: The `[parallelism]` table; its pipeline degree is above 1.
        num_layers: Layers of the model. A run that grows plans every depth.
        local_batch_size: Sequences that a data-parallel rank sees in a forward-backward.
        found: gets warnings, too, about settings that work but are not wise, or have no effect.
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
    """The layout of a schedule of the user's own."""
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
    placement = tuple(_rank_of(part.index, pp, SCHEDULES[schedule].v_shaped) for part in parts)
    return PipelineLayout(schedule, parts, placement, num_microbatches)


def part_table(layout: PipelineLayout) -> list[str]:
    """One line a pp rank for a plan, such as `pp 0: part 0 (tok_embeddings, layers 0-3), part 4 (layers 15-17)`."""
    lines = []
    for rank in range(1 + max(layout.rank_of_part)):
        held = ", ".join(f"part {part.index} ({part.describe()})" for part in layout.parts_of(rank))
        lines.append(f"pp {rank}: {held}")
    return lines


def _resolve_schedule(name: str, found: Findings) -> str | None:
    """The name of one of PyTorch's schedules, given in any case, in its own spelling."""
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
    """Settings that another one overrides."""
    # 1F1B is the default: beside a file it has most likely not been asked for.
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
    """What PyTorch's schedule class has against the number of microbatches."""
    number = batch // size
    rounds = max(1, number // pp)
    if schedule in ("1F1B", "DualPipeV") and number < num_parts:
        reason = f"{schedule} needs at least as many as parts, {num_parts}"
        hint = f"{num_parts * size} would fit"
    elif schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and number % rounds:
        reason = f"{schedule} takes them in {rounds} rounds ({number} // pp {pp}) of equally many"
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


def _rank_of(part: int, pp: int, v_shaped: bool) -> int:
    return 2 * pp - 1 - part if v_shaped and part >= pp else part % pp


class _Wanted(NamedTuple):
    """How many parts a schedule takes: the numbers nearest to one, and all in words."""

    numbers: set[int]
    text: str


def _wanted_parts(schedule: str, pp: int, num_parts: int, in_file: int | None) -> _Wanted:
    if in_file is not None:
        return _Wanted({in_file}, f"{CSV_KEY} has {in_file}")
    if SCHEDULES[schedule].single:
        return _Wanted({pp}, f"{schedule} takes exactly one part a rank, {pp}")
    if SCHEDULES[schedule].v_shaped:
        return _Wanted({2 * pp}, f"{schedule} takes exactly two parts a rank, {2 * pp}")
    nearest = {max(2, num_parts // pp) * pp, max(2, -(-num_parts // pp)) * pp}
    return _Wanted(nearest, f"{schedule} takes two or more parts a rank, a multiple of {pp} from {2 * pp} on")


def _cut(
    section: ParallelismConfig, num_layers: int, schedule: str, in_file: int | None, found: Findings
) -> tuple[Part, ...] | None:
    """The parts, by name or by an even split; `in_file` is how many a schedule file has."""
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
