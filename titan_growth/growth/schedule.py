"""The growth plan of a run: its models, and when one grows into the next.

`chain.py` derives the models and `points.py` the counts; both are validated before anything starts. At run time the
plan's only state is the lineage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_growth.checkpoint.history import Lineage, Progress
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


def plan_growth(
    section: GrowthConfig,
    chain: Chain,
    found: Findings,
    *,
    steps: int,
    tokens_per_step: Sequence[int],
    seq_lens: Sequence[int],
    progress: Progress | None = None,
    num_growths: int = 0,
) -> GrowthPlan:
    """The growth plan of a recipe, from its models and batches.

    Args:
        tokens_per_step, seq_lens: of each phase of the run.
        progress: counters of the run; None at its start.
        num_growths: past growths, which are not checked again.
    """
    growths = tuple(section.active_stages)
    run_tokens = steps * tokens_per_step[-1]
    points = tuple(
        resolved(planned.when, chain.target, steps=steps, tokens_per_step=rate, run_tokens=run_tokens)
        for planned, rate in zip(growths, tokens_per_step, strict=False)
    )
    growth_plan = GrowthPlan(chain, growths, points)
    for index, planned in enumerate(growths):
        half = steps * tokens_per_step[index]
        if planned.when.unit == "auto" and (doubts := advise(chain.target, run_tokens, half).doubts):
            found.warn(f"growth.stages.{index}.at", f'"auto" comes to {points[index]}, but {doubts}')
    flops_per_token = [config.flops_per_token(length) for config, length in zip(chain.configs, seq_lens, strict=True)]
    rates = [
        {"steps": 1, "tokens": tokens, "FLOPs": tokens * flops}
        for tokens, flops in zip(tokens_per_step, flops_per_token, strict=True)
    ]
    _check_timing(growth_plan, found, steps=steps, rates=rates, now=progress or Progress(), num_growths=num_growths)
    return growth_plan


def _check_timing(
    growth_plan: GrowthPlan,
    found: Findings,
    *,
    steps: int,
    rates: Sequence[dict[str, int]],
    now: Progress,
    num_growths: int,
) -> None:
    """Growths that would come too late or out of order.

    Args:
        rates: of each phase, what a step adds to each counter. They include masked positions, so growths given in
            tokens may come later than this says.
    """
    plain = all(point.unit == "steps" for point in growth_plan.points)
    if plain and not any(planned.mask_steps for planned in growth_plan.planned):
        return  # checked before the batch is known (config/checks.py)
    resumed = now.step > 0
    step, counts = now.step, {unit: count_of(now, unit) for unit in ("steps", "tokens", "FLOPs")}
    previous = step - 1
    for index in range(num_growths, len(growth_plan.points)):
        point, planned, rate = growth_plan.points[index], growth_plan.planned[index], rates[index]
        if point.unit == "slope":
            num_steps = 0 if resumed else point.window  # earlier losses count too
        else:
            num_steps = max(0, -(-(point.count - counts[point.unit]) // rate[point.unit]))
        step += num_steps
        counts = {unit: count + num_steps * rate[unit] for unit, count in counts.items()}
        key = f"growth.stages.{index}.at"
        if step >= steps:
            message = f'"{planned.at}" is not before the last step ({steps:,} steps of {rate["tokens"]:,} tokens)'
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
