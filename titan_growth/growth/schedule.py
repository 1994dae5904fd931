"""The growth plan of a run: its models, and when one grows into the next.

`chain.py` derives the models and `points.py` the counts; both are validated before anything starts. At run time the
plan's only state is the lineage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.duration import Duration
from titan_growth.config.schema.growth import GrowthConfig, PlannedGrowth
from titan_growth.growth.chain import Chain
from titan_growth.growth.points import advise, resolved, slope
from titan_growth.tools.errors import TrainingError
from titan_growth.tools.findings import Findings


@dataclass(frozen=True)
class GrowthPlan:
    """The growths of a run in their order, and when each of them comes."""

    chain: Chain
    planned: tuple[PlannedGrowth, ...]
    points: tuple[Duration, ...]
    """When, as counts (or a slope): "25%" and "auto" are resolved."""

    def due(self, progress: Progress, lineage: Lineage, losses: Sequence[float] = ()) -> PlannedGrowth | None:
        """The growth to carry out now: the next one, once its point has been reached.

        Args:
            losses: the last training losses, as many as `window_after` asks for.
        """
        done = len(lineage.events)
        if done == len(self.planned):
            return None
        point = self.points[done]
        if progress.step < lineage.postponed_to(done):
            return None
        if done and progress.step < lineage.grown_at[-1] + (self.planned[done - 1].mask_steps or 0):
            return None  # the last growth's mask is still opening
        if done and progress.step < lineage.grown_at[-1] + lineage.postponed_by(done - 1):
            return None  # a postponed growth gets its full time before the next one
        if point.unit == "slope":
            reached = len(losses) >= point.window and slope(list(losses[-point.window :])) < float(point.value)
        else:
            reached = self.reached(done, progress)
        return self.planned[done] if reached else None

    def reached(self, number: int, progress: Progress) -> bool:
        """Whether the run has reached the count of a growth; a slope counts as reached."""
        point = self.points[number]
        return point.unit == "slope" or count_of(progress, point.unit) >= point.count

    def window_after(self, num_growths: int) -> int:
        """How many losses decide the next growth; 0 when it does not depend on them."""
        return self.points[num_growths].window if num_growths < len(self.points) else 0

    def require_complete(self, progress: Progress, lineage: Lineage) -> None:
        """Raises TrainingError when a finished run is not at its target."""
        done = len(lineage.events)
        if done < len(self.planned):
            raise TrainingError(
                f"the growth at {self.planned[done].when} never came: the run ended with {progress.tokens:,} tokens at "
                f"{self.chain.configs[done].num_layers} layers. Raise training.steps to go on"
            )


def count_of(progress: Progress, unit: str) -> int:
    """The counter that a point is measured in."""
    return {"steps": progress.step, "tokens": progress.tokens, "FLOPs": progress.flops}[unit]


@dataclass(frozen=True)
class Pace:
    """What the steps of a phase add to the counters; masked positions are counted as tokens."""

    batches: BatchSizes
    seq_len: int
    flops_per_token: int

    def tokens(self, step: int) -> int:
        """Tokens of all steps up to this one, as if the whole run went at this pace."""
        return self.batches.sequences(step) * self.seq_len

    def after(self, now: Progress, num_steps: int) -> Progress:
        """The counters some steps later; the cursor is left alone."""
        tokens = self.tokens(now.step + num_steps) - self.tokens(now.step)
        flops = tokens * self.flops_per_token
        return replace(now, step=now.step + num_steps, tokens=now.tokens + tokens, flops=now.flops + flops)

    def steps_to(self, now: Progress, point: Duration) -> int:
        """Steps from here to the first one that reaches a count; not positive when it has been reached."""
        missing = point.count - count_of(now, point.unit)
        if point.unit == "steps" or missing <= 0:
            return missing if point.unit == "steps" else 0
        per_sequence = self.seq_len * (self.flops_per_token if point.unit == "FLOPs" else 1)
        return self.batches.step_reaching(self.batches.sequences(now.step) - (-missing // per_sequence)) - now.step


def ends_of_phases(points: Sequence[Duration], paces: Sequence[Pace], steps: int) -> Iterator[Progress]:
    """The counters at the end of each phase of a run of `steps`: a growth comes after the first step at its count.

    One that waits for a slope is taken to come as early as it can.
    """
    now = Progress()
    for pace, end in zip(paces, [*points, None], strict=True):
        if end is None:
            now = pace.after(now, steps - now.step)
        else:
            now = pace.after(now, end.window if end.unit == "slope" else pace.steps_to(now, end))
        yield now


def plan_growth(
    section: GrowthConfig,
    chain: Chain,
    found: Findings,
    *,
    steps: int,
    paces: Sequence[Pace],
    progress: Progress | None = None,
    num_growths: int = 0,
) -> GrowthPlan:
    """The growth plan of a recipe, from its models and batches.

    Args:
        paces: of each phase of the run.
        progress: counters of the run; None at its start.
        num_growths: past growths, which are not checked again.
    """
    growths = tuple(section.active_stages)
    run_tokens = paces[-1].tokens(steps)
    points = tuple(
        resolved(planned.when, chain.target, steps=steps, clamp_tokens=pace.tokens(steps), run_tokens=run_tokens)
        for planned, pace in zip(growths, paces, strict=False)
    )
    growth_plan = GrowthPlan(chain, growths, points)
    for index, planned in enumerate(growths):
        if planned.when.unit == "auto" and (
            doubts := advise(chain.target, run_tokens, paces[index].tokens(steps)).doubts
        ):
            found.warn(f"growth.stages.{index}.at", f'"auto" comes to {points[index]}, but {doubts}')
    _check_timing(growth_plan, found, steps=steps, paces=paces, now=progress or Progress(), num_growths=num_growths)
    return growth_plan


def _check_timing(
    growth_plan: GrowthPlan,
    found: Findings,
    *,
    steps: int,
    paces: Sequence[Pace],
    now: Progress,
    num_growths: int,
) -> None:
    """Growths that would come too late or out of order.

    Args:
        paces: of each phase. They include masked positions, so growths given in tokens may come later than this says.
    """
    plain = all(point.unit == "steps" for point in growth_plan.points)
    if plain and not any(planned.mask_steps for planned in growth_plan.planned):
        return  # checked before the batch is known (config/checks.py)
    resumed = now.step > 0
    previous = now.step - 1
    for index in range(num_growths, len(growth_plan.points)):
        point, planned, pace = growth_plan.points[index], growth_plan.planned[index], paces[index]
        if point.unit != "slope":
            now = pace.after(now, max(0, pace.steps_to(now, point)))
        elif not resumed:  # else earlier losses count too
            now = pace.after(now, point.window)
        step = now.step
        key = f"growth.stages.{index}.at"
        if step >= steps:
            size = f"{pace.batches.size(max(1, step)) * pace.seq_len:,} tokens"
            message = f'"{planned.at}" is not before the last step ({steps:,} steps of {size})'
            hint = "Grow earlier or train longer; growth.enable = false trains the target model from scratch"
            found.problem(key, message, hint)
        elif resumed:
            pass  # an overdue or postponed growth comes a step after the one before it
        elif index > num_growths and step < previous + (growth_plan.planned[index - 1].mask_steps or 0):
            message = (
                f'"{planned.at}" (step {step:,}) is within the mask_steps of the growth before it (step {previous:,})'
            )
            found.problem(key, message, "Let a mask open before the next growth")
        elif step <= previous:
            message = f'"{planned.at}" (step {step:,}) is not after the growth before it (step {previous:,})'
            found.problem(key, message, "Stages are in the order they happen")
        previous = step
