"""`[[training.batch_schedule]]`, checked and described once the steps of a run's phases are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.config.schema.recipe import TrainingConfig
from titan_growth.growth.schedule import GrowthPlan, ends_of_phases
from titan_growth.layout.mesh_shape import resolve_batch
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.phases import Phase
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many

KEY = "training.batch_schedule"


def check_batch_schedule(
    phases: Sequence[Phase], growth_plan: GrowthPlan, found: Findings, *, first_phase: int, step: int
) -> None:
    """Reports entries that are out of order, that a growth contradicts, or whose size does not fit a mesh.

    Args:
        phases: of the whole run.
        first_phase, step: where the run resumes. What is behind it need not fit.
    """
    training = phases[0].recipe.training
    if not training.batch_schedule:
        return
    batches = BatchSizes.of(training)
    _check_order(training, batches, found)
    for index, planned in enumerate(growth_plan.planned):
        _check_pace(index, planned, f"and so does {KEY}", found)
        if growth_plan.chain.maps[index].learned:
            message = f"a learned growth reads batches between two steps, which have no place in {KEY}"
            found.problem(f"growth.stages.{index}.operator", message, "Choose another operator, or one batch size")
    if found.problems:
        return
    ends = ends_of_phases(growth_plan.points, [phase.pace for phase in phases], training.steps)
    starts = [0, *(end.step for end in ends)]
    for phase, start in list(zip(phases, starts, strict=False))[first_phase:]:
        _check_sizes(phase, max(start, step), batches, found)


def check_tokens_of_lengths(in_tokens: Sequence[str], growth_plan: GrowthPlan, found: Findings) -> None:
    """Reports growths that change the tokens of a step under a learning rate with lengths in tokens.

    Which step a number of tokens comes to would depend on when the run grows.

    Args:
        in_tokens: the keys of those lengths.
    """
    for index, planned in enumerate(growth_plan.planned if in_tokens else ()):
        _check_pace(index, planned, f"which {in_tokens[0]} is given in", found)


def _check_pace(index: int, planned: PlannedGrowth, why: str, found: Findings) -> None:
    for key in ("global_batch_size", "seq_len"):
        if getattr(planned, key) is not None:
            hint = f"Leave it out; a change of the batch can be an entry of {KEY}"
            if key == "seq_len":
                hint = "Leave it out, or give steps"
            found.problem(f"growth.stages.{index}.{key}", f"changes the tokens of a step, {why}", hint)


def _check_order(training: TrainingConfig, batches: BatchSizes, found: Findings) -> None:
    for index, entry in enumerate(training.batch_schedule):
        before, start = batches.starts[index : index + 2]
        key = f"{KEY}.{index}.at"
        if start <= before:
            message = f'"{entry.at}" (step {start:,}) is not after the size before it (step {before:,})'
            found.problem(key, message, "Entries are in the order they happen, at least a step apart")
        elif start >= training.steps:
            found.warn(key, f'"{entry.at}" (step {start:,}) never comes: the run has {many(training.steps, "step")}')


def _check_sizes(phase: Phase, start: int, batches: BatchSizes, found: Findings) -> None:
    """Every size that may be in force in a phase fits its mesh.

    A growth may be put off, so a phase has to fit the sizes to the end of the run.
    """
    training = phase.recipe.training
    for index, (size, first, end) in enumerate(batches.stretches()):
        if (end is not None and end <= start) or first >= training.steps:
            continue
        own = Findings()
        resolve_batch(size, training.local_batch_size, phase.mesh_shape, own)
        key = f"{KEY}.{index - 1}.global_batch_size" if index else "training.global_batch_size"
        known = {(problem.key, problem.message) for problem in found.problems}
        new = [replace(problem, key=key) for problem in own.problems]
        found.problems += [problem for problem in new if (problem.key, problem.message) not in known]


def batch_lines(training: TrainingConfig) -> list[str]:
    """A line for each later size of the batch; none without a schedule."""
    batches = BatchSizes.of(training)
    later = list(batches.stretches())[1:]
    return [
        f"  from step {start + 1:,} on ({_tokens(training, start)}): {size} sequences a step"
        for size, start, _ in later
        if start < training.steps
    ]


def rate_lines(training: TrainingConfig, schedule: LRSchedule, grown_at: Sequence[int]) -> Iterator[str]:
    """Where warmups, stable phases and decays begin and end, in steps and tokens; nothing if all are counted
    in steps.

    Args:
        grown_at: the steps of the growths, as planned.
    """
    if not (training.batch_schedule or schedule.section.in_tokens or schedule.growth.in_tokens):
        return
    yield "learning rate (measured in tokens, masked positions included):"
    for segment, end in schedule.segments(grown_at):
        warm, stable = segment.start + segment.warmup_steps, segment.start + schedule.stable_steps(segment)
        points = [("warmup to", warm)] if segment.warmup_steps and warm <= end else []
        if stable <= end:
            points += [("stable to", stable)] if stable > warm else []
            points += [("decay to", segment.start + segment.num_steps)] if end > stable else []
        else:
            points += [("stable to", end)]
        yield f"  from step {segment.start + 1:,}: " + ", ".join(
            f"{what} the end of step {step:,} ({_tokens(training, step)})" for what, step in points
        )


def _tokens(training: TrainingConfig, step: int) -> str:
    return f"{BatchSizes.of(training).sequences(step) * training.seq_len:,} tokens"
