"""The learning rate as a pure function of the step and of past growths.

Nothing of it is in a checkpoint, so a changed recipe takes effect on resume. A schedule is a warmup, an optional stable
phase and a decay over a *segment* of the run. The run starts with one segment from step 0 to the end, as if it would
never grow (the base of G_stack is grown un-annealed). A growth with
`lr_policy = "restart"` opens a new segment from there to the end; "continue" changes at most the peak; "rewarm" is
"continue" under a warmup, and "rewarm_new" one whose warmup is for what the growth has added alone (`fresh_share`).

Progress is measured in steps. Under `[[training.batch_schedule]]` steps differ in size, so it is measured in sequences,
which is in tokens: a warmup or a decay of N steps is that of the tokens of those N planned steps, and begins and ends
where they do. Lengths given in tokens take the steps that begin before those tokens are reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from titan_growth.config.batch_sizes import STEPS, BatchSizes
from titan_growth.config.duration import Duration
from titan_growth.config.schema.growth import GrowthBase, GrowthConfig
from titan_growth.config.schema.recipe import LRSchedulerConfig
from titan_growth.tools.findings import Findings


@dataclass(frozen=True)
class Segment:
    """A stretch of the run with one peak and one warmup; steps are counted from 1 within it."""

    start: int
    num_steps: int
    warmup_steps: int
    peak_lr: float


class LRSchedule:
    """Learning rate of every step of a run.

    Args:
        section: the `[lr_scheduler]` table.
        lr: peak learning rate, `optimizer.lr`.
        steps: length of the run, `training.steps`.
        growth: the `[growth]` table.
        measure: what progress is counted in, `BatchSizes.measure_of`.
    """

    def __init__(
        self, section: LRSchedulerConfig, *, lr: float, steps: int, growth: GrowthConfig, measure: BatchSizes = STEPS
    ) -> None:
        self.section = section
        self.lr = lr
        self.steps = steps
        self.growth = growth
        self.measure = measure
        self.total_steps = section.total_steps or steps
        if section.total is not None:
            self.total_steps = measure.steps_of(Duration.parse(section.total))

    def measured_in(self, measure: BatchSizes) -> LRSchedule:
        """The same schedule, its progress counted in something else."""
        return LRSchedule(self.section, lr=self.lr, steps=self.steps, growth=self.growth, measure=measure)

    def __call__(self, step: int, grown_at: Sequence[int] = ()) -> float:
        """The learning rate of a step, counted from 1, after growths at the given steps."""
        segment = self.segment(step, grown_at)
        lr = segment.peak_lr * self._factor(step - segment.start, segment)
        return lr * self._warming("rewarm", step, grown_at)

    def fresh_share(self, step: int, grown_at: Sequence[int] = ()) -> float:
        """The share of a step's learning rate that parameters new in the last growth get (`rewarm_new`)."""
        return self._warming("rewarm_new", step, grown_at)

    def _warming(self, policy: str, step: int, grown_at: Sequence[int]) -> float:
        """How far the warmup of the last growth has come at a step, as a fraction; 1 under another policy."""
        passed = [index for index, at in enumerate(grown_at) if at < step]
        if not passed or passed[-1] >= len(self.growth.active_stages):
            return 1.0
        planned, start = self.growth.active_stages[passed[-1]], grown_at[passed[-1]]
        warmup = min(self.warmup_after(start, planned.own_warmup), max(0, self.total_steps - start))
        return (
            min(1.0, self._between(start, step) / self._between(start, start + warmup))
            if planned.lr_policy == policy and warmup
            else 1.0
        )

    def stands(self, step: int, grown_at: Sequence[int] = ()) -> Literal["warmup", "stable", "decay"]:
        """Where the learning rate stands after a step: what the next one goes on with."""
        step = max(step, 1)
        segment = self.segment(step, grown_at)
        warmed = [self._warming(policy, step, grown_at) for policy in ("rewarm", "rewarm_new")]
        if step - segment.start < segment.warmup_steps or min(warmed) < 1.0:
            return "warmup"
        return "decay" if step - segment.start > self.stable_steps(segment) else "stable"

    def segments(self, grown_at: Sequence[int]) -> Iterator[tuple[Segment, int]]:
        """The segments of a run that grew at these steps, each with its last step."""
        starts = sorted({self.segment(step, grown_at).start for step in (1, *(at + 1 for at in grown_at))})
        for start, end in zip(starts, [*starts[1:], self.total_steps], strict=True):
            yield self.segment(start + 1, grown_at), end

    def segment(self, step: int, grown_at: Sequence[int] = ()) -> Segment:
        """The segment that a step belongs to."""
        base = self.growth.base if self.growth.active_stages else GrowthBase()
        segment = self._segment(0, base.lr or self.lr, base.own_warmup)
        for planned, at in zip(self.growth.active_stages, grown_at, strict=False):
            if step <= at:
                break
            if planned.lr_policy == "restart":
                segment = self._segment(at, planned.lr or self.lr, planned.own_warmup)
            elif planned.lr is not None:
                segment = replace(segment, peak_lr=planned.lr)
        return segment

    def _segment(self, start: int, peak_lr: float, warmup: Duration | None) -> Segment:
        num_steps = max(0, self.total_steps - start)
        return Segment(start, num_steps, min(self.warmup_after(start, warmup), num_steps), peak_lr)

    def warmup_after(self, start: int, given: Duration | None = None) -> int:
        """Steps of a warmup that begins after a step; `given` is that of a growth or base that has its own."""
        if given is None and self.section.warmup is not None:
            given = Duration.parse(self.section.warmup)
        return self.section.warmup_steps if given is None else self.measure.steps_of(given, start)

    def warn_of_lengths(self, found: Findings) -> None:
        """Warns of lengths that do not fit: warmups and decays that are cut, and steps beyond `total`.

        Growths given in tokens are left out: where they fall is not known from the recipe alone.
        """
        default = "lr_scheduler.warmup_steps" if self.section.warmup is None else "lr_scheduler.warmup"
        asked = [(default, 0, self.warmup_after(0))]
        base = self.growth.base
        if self.growth.active_stages and base.own_warmup is not None:
            asked = [(f"growth.base.{base.warmup_key}", 0, self.warmup_after(0, base.own_warmup))]
        for index, planned in enumerate(self.growth.active_stages):
            if planned.lr_policy != "continue" and planned.when.unit == "steps":
                given, at = planned.own_warmup, planned.when.count
                key = default if given is None else f"growth.stages.{index}.{planned.warmup_key}"
                asked.append((key, at, self.warmup_after(at, given)))
        for key, start, steps in asked:
            length = max(0, self.total_steps - start)
            if steps > length:
                found.warn(key, f"{steps} is longer than the {length} steps it is for, and is cut to that")
        if self.section.total is not None and self.total_steps < self.steps:
            message = (
                f"{self.total_steps} steps are less than training.steps = {self.steps}; the rest runs at the floor"
            )
            found.warn("lr_scheduler.total", message)
        if self.section.decay is not None:
            whole = self._segment(0, self.lr, None)
            if (asked_for := self.total_steps - self._decay_start(0)) > (left := whole.num_steps - whole.warmup_steps):
                message = f"{asked_for} steps are more than the {left} that the warmup leaves, and are cut to that"
                found.warn("lr_scheduler.decay", message)

    def _factor(self, step: int, segment: Segment) -> float:
        """Share of the peak at a step of the segment, from 1.

        The decay ends one virtual step after the segment, so that the last step still learns. Steps beyond the segment
        (`total_steps` less than the run) stay at the floor.
        """
        section = self.section
        if step > segment.num_steps:
            return section.min_lr_factor
        start = segment.start
        if step <= segment.warmup_steps:
            return self._between(start, start + step) / self._between(start, start + segment.warmup_steps)
        stable = self.stable_steps(segment)
        if step <= stable:
            return 1.0
        decay = self._between(start + stable, start + segment.num_steps)
        progress = self._between(start + stable, start + step - 1) / decay
        shape = {
            "linear": 1.0 - progress,
            "sqrt": 1.0 - math.sqrt(progress),
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[section.decay_type]
        return section.min_lr_factor + (1.0 - section.min_lr_factor) * shape

    def stable_steps(self, segment: Segment) -> int:
        """Steps of a segment, warmup included, before its decay; all of them if it has none."""
        return max(segment.warmup_steps, self._decay_start(segment.start + segment.warmup_steps) - segment.start)

    def _decay_start(self, warm: int) -> int:
        """The step after which the decay begins, for a warmup that ends with a step.

        Its length is one of the run, not of what a growth has left of it: a grown run anneals as long as one that never
        grows.
        """
        section, whole = self.section, self.measure.sequences(self.total_steps)
        if section.decay is not None:
            length = Duration.parse(section.decay)
            if length.unit == "steps":
                return self.total_steps - length.count
            # At least one step: a decay that was asked for does not vanish in a large batch.
            return min(self.measure.step_nearest(whole - self.measure.sequences_of(length)), self.total_steps - 1)
        if section.decay_ratio is not None:
            return self.measure.step_nearest(whole - round(whole * section.decay_ratio))
        return warm

    def _between(self, first: int, last: int) -> int:
        """Progress from the end of one step to the end of another."""
        return self.measure.sequences(last) - self.measure.sequences(first)
