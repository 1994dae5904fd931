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

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.recipe import ParallelismConfig
from titan_growth.layout.pipeline_parts import LAYERS_PER_PART, NAMES, Part, cut_by_name, cut_evenly, many
from titan_growth.layout.schedule_csv import KEY as CSV_KEY
from titan_growth.layout.schedule_csv import Action, read_schedule_csv
from titan_growth.tools.errors import Problem

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


def schedule_conditions(name: str) -> ScheduleConditions:
    """The conditions of one of PyTorch's schedules, by its name in any case.

    Raises:
        ValueError: for another name. A schedule file has no conditions of its own: ask `PipelineLayout.conditions`.
    """
    schedule, problems = _resolve_schedule(name)
    if problems:
        raise ValueError(problems[0].message)
    return SCHEDULES[schedule]


def plan_pipeline(
    section: ParallelismConfig, num_layers: int, local_batch_size: int
) -> tuple[PipelineLayout | None, list[Problem], list[Problem]]:
    """(layout, problems, warnings) of a recipe with a pipeline, for a model of one depth.

    Args:
        section: The `[parallelism]` table; its pipeline degree is above 1.
        num_layers: Layers of the model. A run that grows plans every depth.
        local_batch_size: Sequences that a data-parallel rank sees in a forward-backward.

    Returns:
        The layout is None exactly when there are problems. Warnings are about settings that work but are not wise, or
        have no effect.
    """
    pp = section.pipeline_parallel_degree
    assert pp > 1, "without a pipeline there is nothing to lay out"
    size = section.pipeline_parallel_microbatch_size
    num_microbatches, problems = _count_microbatches(local_batch_size, size)
    order: tuple[tuple[Action, ...], ...] = ()
    if section.pipeline_parallel_schedule_csv:
        schedule = CSV
        file, found = read_schedule_csv(section.pipeline_parallel_schedule_csv, pp)
        if file is None:
            return None, problems + found, []
        order, placement, expected = file.order, file.rank_of_part, file.num_microbatches
        if not problems and expected != num_microbatches:
            message = (
                f"{section.pipeline_parallel_schedule_csv} has {many(expected, 'microbatch')}, but "
                f"training.local_batch_size {local_batch_size} in microbatches of {size} makes {num_microbatches}"
            )
            problems.append(Problem(CSV_KEY, message, f"A training.local_batch_size of {expected * size} would fit"))
        parts, found = _cut(section, num_layers, schedule, len(placement))
    else:
        schedule, found = _resolve_schedule(section.pipeline_parallel_schedule)
        if found:
            return None, problems + found, []
        parts, found = _cut(section, num_layers, schedule, None)
        placement = tuple(_rank_of(part.index, pp, SCHEDULES[schedule].v_shaped) for part in parts)
        if not problems and not found:
            problems += _check_microbatches(schedule, pp, len(parts), local_batch_size, size)
    problems += found
    if problems:
        return None, problems, []
    warnings = _unused_settings(section)
    if num_microbatches < len(parts):
        message = (
            f"{local_batch_size} makes {many(num_microbatches, 'microbatch')} for {len(parts)} pipeline parts; "
            "with fewer microbatches than parts, ranks wait for each other most of the time"
        )
        hint = f"{len(parts) * size} would be the least for {len(parts)} microbatches"
        warnings.append(Problem("training.local_batch_size", message, hint))
    return PipelineLayout(schedule, parts, placement, num_microbatches, order), [], warnings


def part_table(layout: PipelineLayout) -> list[str]:
    """One line a pp rank for a plan, such as `pp 0: part 0 (tok_embeddings, layers 0-3), part 4 (layers 15-17)`."""
    lines = []
    for rank in range(1 + max(layout.rank_of_part)):
        held = ", ".join(f"part {part.index} ({part.describe()})" for part in layout.parts_of(rank))
        lines.append(f"pp {rank}: {held}")
    return lines


def _resolve_schedule(name: str) -> tuple[str, list[Problem]]:
    """The name in PyTorch's own spelling."""
    spellings = {schedule.lower(): schedule for schedule in SCHEDULES}
    if name.lower() in spellings:
        return spellings[name.lower()], []
    known = ", ".join(SCHEDULES)
    if name.lower() in ("pipelineschedulesingle", "pipelineschedulemulti"):
        message = f"{name} is only the base class of schedules and cannot run itself"
        return "", [Problem(_SCHEDULE, message, f"Choose one of {known}")]
    message = f"unknown schedule {name!r}; the schedules are {known}"
    return "", [Problem(_SCHEDULE, message, suggestion(name, SCHEDULES))]


def _unused_settings(section: ParallelismConfig) -> list[Problem]:
    """Warnings about settings that another one overrides."""
    warnings = []
    # 1F1B is the default: whoever asks for it beside a file has most likely said nothing.
    if section.pipeline_parallel_schedule_csv and section.pipeline_parallel_schedule.lower() != "1f1b":
        message = f"{section.pipeline_parallel_schedule} is not used: {CSV_KEY} is the schedule"
        warnings.append(Problem(_SCHEDULE, message))
    if section.module_fqns_per_model_part is not None and section.pipeline_parallel_layers_per_stage is not None:
        warnings.append(Problem(LAYERS_PER_PART, f"is not used: {NAMES} is the split"))
    return warnings


# Microbatches.


def _count_microbatches(batch: int, size: int) -> tuple[int, list[Problem]]:
    if batch % size == 0:
        return batch // size, []
    message = f"{size} does not divide training.local_batch_size {batch}"
    return 0, [Problem(_MICROBATCH_SIZE, message, f"{math.gcd(size, batch)} would fit")]


def _check_microbatches(schedule: str, pp: int, num_parts: int, batch: int, size: int) -> list[Problem]:
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
        return []
    message = f"{batch} makes {many(number, 'microbatch')} of {size}, but {reason}"
    if size > 1 and not _check_microbatches(schedule, pp, num_parts, batch, 1):
        hint += f", and so would {_MICROBATCH_SIZE} 1"
    return [Problem("training.local_batch_size", message, hint)]


# Parts.


def _rank_of(part: int, pp: int, v_shaped: bool) -> int:
    return 2 * pp - 1 - part if v_shaped and part >= pp else part % pp


def _wanted_parts(schedule: str, pp: int, num_parts: int, in_file: int | None) -> tuple[set[int], str]:
    """(the numbers of parts nearest to one that a schedule takes, what it takes in words)."""
    if in_file is not None:
        return {in_file}, f"{CSV_KEY} has {in_file}"
    if SCHEDULES[schedule].single:
        return {pp}, f"{schedule} takes exactly one part a rank, {pp}"
    if SCHEDULES[schedule].v_shaped:
        return {2 * pp}, f"{schedule} takes exactly two parts a rank, {2 * pp}"
    nearest = {max(2, num_parts // pp) * pp, max(2, -(-num_parts // pp)) * pp}
    return nearest, f"{schedule} takes two or more parts a rank, a multiple of {pp} from {2 * pp} on"


def _cut(
    section: ParallelismConfig, num_layers: int, schedule: str, in_file: int | None
) -> tuple[tuple[Part, ...], list[Problem]]:
    """The parts, by name or by an even split; `in_file` is how many a schedule file has."""
    pp = section.pipeline_parallel_degree
    names, layers_per_part = section.module_fqns_per_model_part, section.pipeline_parallel_layers_per_stage
    if names is not None:
        wanted, words = _wanted_parts(schedule, pp, len(names), in_file)
        if len(names) not in wanted:
            return (), [Problem(NAMES, f"has {many(len(names), 'part')}, but {words}")]
        return cut_by_name(names, num_layers)
    if layers_per_part is None:
        num_parts = in_file or pp * (1 if SCHEDULES[schedule].single else 2)
        return cut_evenly(section, num_layers, num_parts, CSV_KEY if in_file else _DEGREE)
    less = section.pipeline_parallel_first_stage_less_layers + section.pipeline_parallel_last_stage_less_layers
    num_parts = -(-(num_layers + less) // layers_per_part)
    wanted, words = _wanted_parts(schedule, pp, num_parts, in_file)
    if num_parts not in wanted:
        made = f"{layers_per_part} makes {many(num_parts, 'part')} of {num_layers} layers + {less} less_layers"
        sizes = {parts: -(-(num_layers + less) // parts) for parts in wanted}
        fits = sorted(size for parts, size in sizes.items() if -(-(num_layers + less) // size) == parts)
        hint = f"{' or '.join(map(str, fits))} would fit" if fits else "Leave it out"
        return (), [Problem(LAYERS_PER_PART, f"{made}, but {words}", hint)]
    return cut_evenly(section, num_layers, num_parts, LAYERS_PER_PART)
