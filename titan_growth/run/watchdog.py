"""The watchdog of a growth: has the loss recovered?

A growth that does not preserve the function makes the loss jump, and a good one recovers within a few hundred steps. So
the recovery is watched, not the jump: `steps` after the growth (or just before the next one) the loss on the fixed
held-out batch must be at most `max_rise` nats above its value before the growth. If it is not, the run warns, stops, or
rolls back: it resumes from the small model's checkpoint and grows again `steps` later than it did. What came after that
checkpoint is set aside, not deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from titan_growth.checkpoint.history import GrowthEvent, Lineage, RollBack
from titan_growth.checkpoint.rewind import RollBackError
from titan_growth.config.schema.growth import PlannedGrowth, WatchdogConfig
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.plan import RunPlan
from titan_growth.tools.errors import TrainingError
from titan_growth.tools.text import many

LEAST_STEPS = 100


@dataclass(frozen=True)
class Watchdog:
    """Judges the last growth once."""

    section: WatchdogConfig
    planned: Sequence[PlannedGrowth]
    """The growths of the run."""
    schedule: LRSchedule
    """Of the learning rate: a growth has twice its warmup to recover."""
    total_steps: int
    """At the last step a growth too recent to judge is only reported."""

    @classmethod
    def of(cls, plan: RunPlan) -> Watchdog:
        """The watchdog of a run."""
        recipe, planned = plan.recipe, plan.growth_plan.planned
        return cls(recipe.growth.watchdog, planned, plan.schedule, recipe.training.steps)

    def steps_of(self, number: int, start: int) -> int:
        """Steps that a growth after a step has to recover; 0 for a growth that is not watched."""
        if self.section.steps is not None:
            return self.section.steps
        planned = self.planned[number]
        warmup = self.schedule.warmup_after(start, planned.own_warmup)
        return max(LEAST_STEPS, 2 * warmup, 2 * (planned.mask_steps or 0))

    def due(self, step: int, lineage: Lineage, *, grows: bool) -> GrowthEvent | None:
        """The growth to judge after a step: its time is up, or the next growth or the end has come."""
        if not lineage.events:
            return None
        event, number = lineage.events[-1], len(lineage.events) - 1
        left = event.step + self.steps_of(number, event.step) - step
        early = grows or step == self.total_steps
        return event if self.steps_of(number, event.step) and (left == 0 or (early and left > 0)) else None

    def judge(self, event: GrowthEvent, lineage: Lineage, step: int, loss: float) -> str:
        """The verdict on a growth.

        Args:
            loss: on the held-out batch, now.

        Raises:
            TrainingError, RollBackError: when it has not recovered and the recipe says so.
        """
        assert event.loss_before is not None, "a growth of a run has been judged before it"
        rise = loss - event.loss_before
        verdict = (
            f"{many(step - event.step, 'step')} after growing to {event.to_layers} layers the loss on the held-out "
            f"batch is {loss:.4f}, and was {event.loss_before:.4f} before"
        )
        if rise <= self.section.max_rise:
            return verdict
        number = len(lineage.events) - 1
        verdict += f": {rise:.4f} nats more, where growth.watchdog.max_rise allows {self.section.max_rise:g}"
        if step == self.total_steps and step < event.step + self.steps_of(number, event.step):
            return f"{verdict}, but the run ends before it is due"
        if self.section.action == "warn":
            return verdict
        if self.section.action == "stop":
            raise TrainingError(f"{verdict}. The small model's checkpoint is {event.source}")
        so_far = sum(one.growth == number for one in lineage.roll_backs)
        if so_far >= self.section.max_roll_backs:
            raise TrainingError(
                f"{verdict}, after {many(so_far, 'roll-back')}. The small model's checkpoint is "
                f"{event.source}; change the growth, or growth.watchdog.max_roll_backs"
            )
        roll_back = RollBack(
            growth=number,
            step=event.step,
            noticed_at=step,
            loss_before=event.loss_before,
            loss_then=loss,
            postponed_to=event.step + self.steps_of(number, event.step),
        )
        if roll_back.postponed_to >= self.total_steps:
            raise TrainingError(
                f"{verdict}. A roll-back would leave no steps to grow in; the small model is {event.source}"
            )
        raise RollBackError(
            "the growth",
            lambda manifest: replace(manifest, held_out_loss=None, roll_back=asdict(roll_back)),
            event.source,
        )
