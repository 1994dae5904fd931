"""The growth plan of a run: which models it goes through, and when one becomes the next.

`chain.py` works out the models and `points.py` the counts; both are validated as a whole before anything starts. At run
time the plan's only memory is the lineage: the number of growths that have happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.config.duration import Duration
from titan_growth.config.schema.growth import GrowthConfig, PlannedGrowth
from titan_growth.growth.chain import Chain
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.points import advise, resolved, slope
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import TrainingError
from titan_growth.tools.findings import Findings


@dataclass(frozen=True)
class GrowthPlan:
    """The growths of a run in their order, and when each of them comes."""

    chain: Chain
    planned: tuple[PlannedGrowth, ...]
    points: tuple[Duration, ...]
    """When, as counts (or a slope): "25%" and "auto" are resolved."""

    @property
    def configs(self) -> tuple[DecoderConfig, ...]:
        """The models of the run in their order."""
        return self.chain.configs

    def map_after(self, num_growths: int) -> GrowthMap:
        """The growth that comes after `num_growths` others."""
        return self.chain.maps[num_growths]

    def config_after(self, num_growths: int) -> DecoderConfig:
        """The model after `num_growths` growths."""
        return self.configs[num_growths]

    def due(self, progress: Progress, lineage: Lineage, losses: Sequence[float] = ()) -> PlannedGrowth | None:
        """The growth to carry out now: the next one, once its count has been reached.

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
            return None  # what the last growth has added is not all there yet
        if done and progress.step < lineage.grown_at[-1] + lineage.postponed_by(done - 1):
            return None  # a growth that came late is given its time, and not judged because the next one is due
        if point.unit == "slope":
            reached = len(losses) >= point.window and slope(list(losses[-point.window :])) < float(point.value)
        else:
            reached = self.reached(done, progress)
        return self.planned[done] if reached else None

    def reached(self, number: int, progress: Progress) -> bool:
        """Whether the count of a growth has come; a slope is taken for one that has."""
        point = self.points[number]
        return point.unit == "slope" or count_of(progress, point.unit) >= point.count

    def window_after(self, num_growths: int) -> int:
        """How many losses the next growth is decided by; 0 when it does not depend on them."""
        return self.points[num_growths].window if num_growths < len(self.points) else 0

    def remaining(self, lineage: Lineage) -> tuple[PlannedGrowth, ...]:
        """Growths that have not happened."""
        return self.planned[len(lineage.events) :]

    def require_complete(self, progress: Progress, lineage: Lineage) -> None:
        """Raises TrainingError when a run that has come to its last step is not at its target."""
        for planned in self.remaining(lineage):
            config = self.config_after(len(lineage.events))
            raise TrainingError(
                f"the growth at {planned.when} never came: the run ended with {progress.tokens:,} tokens at "
                f"{config.num_layers} layers. Raise training.steps to go on"
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
    """When the growths of a recipe come, once its models and batches are known.

    Args:
        tokens_per_step, seq_lens: of each phase of the run.
        progress: where the run has come to; None at its start.
        num_growths: how many have happened, which are not checked again.
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
    now = progress or Progress()
    _check_timing(growth_plan, found, steps=steps, rates=rates, now=now, num_growths=num_growths)
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
        rates: of each phase, what a step adds to each counter; masked positions are counted, so growths given in tokens
            may come later than this says.
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
            num_steps = 0 if resumed else point.window  # the losses of before count as well
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
            pass  # a growth that is overdue, or was postponed, comes a step after the one before it
        elif index > num_growths and step < previous + (growth_plan.planned[index - 1].mask_steps or 0):
            message = (
                f'"{planned.at}" (step {step:,}) is within the mask_steps of the growth before it (step {previous:,})'
            )
            found.problem(key, message, "Let a mask open before the next growth")
        elif step <= previous:
            message = f'"{planned.at}" (step {step:,}) is not after the growth before it (step {previous:,})'
            found.problem(key, message, "Stages are in the order they happen")
        previous = step
