"""The watchdog of a growth: has the loss come back, some steps later, to where it was before?

A growth that does not preserve the function makes the loss jump, and a good one recovers within a few hundred steps. So
it is not the jump that is watched but its end: `steps` after the growth (or just before the next one) the loss on the
fixed held-out batch must be at most `max_rise` nats above what it was before the growth. If it is not, the run warns,
stops, or rolls back: it goes on from the small model's checkpoint, as if it had not grown, and grows again `steps`
later than it did. What came after that checkpoint is set aside, not deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from titan_growth.checkpoint.history import GrowthEvent, Lineage, RollBack
from titan_growth.checkpoint.rewind import RollBackError
from titan_growth.config.schema.growth import PlannedGrowth, WatchdogConfig
from titan_growth.run.plan import RunPlan
from titan_growth.tools.errors import TrainingError

LEAST_STEPS = 100


class Watchdog:
    """Judges the last growth once.

    Args:
        section: `[growth.watchdog]`.
        planned: the growths of the run.
        warmup_steps: lr_scheduler.warmup_steps, for growths that do not say.
        total_steps: training.steps; at the last one a growth that is too young to be judged is spoken of.
    """

    def __init__(
        self, section: WatchdogConfig, planned: Sequence[PlannedGrowth], warmup_steps: int, total_steps: int
    ) -> None:
        self.total_steps = total_steps
        self.section = section
        self.planned = planned
        self.warmup_steps = warmup_steps

    @classmethod
    def of(cls, plan: RunPlan) -> Watchdog:
        """The watchdog of a run."""
        recipe = plan.recipe
        return cls(recipe.growth.watchdog, plan.growth_plan.planned, recipe.lr_scheduler.warmup_steps, plan.total_steps)

    def steps_of(self, number: int) -> int:
        """Steps that a growth is given to recover; 0 for a growth that is not watched."""
        if self.section.steps is not None:
            return self.section.steps
        planned = self.planned[number]
        warmup = self.warmup_steps if planned.warmup_steps is None else planned.warmup_steps
        return max(LEAST_STEPS, 2 * warmup, 2 * (planned.mask_steps or 0))

    def due(self, step: int, lineage: Lineage, *, grows: bool) -> GrowthEvent | None:
        """The growth to judge after a step: its time is up, or the next growth comes."""
        if not lineage.events:
            return None
        event, number = lineage.events[-1], len(lineage.events) - 1
        left = event.step + self.steps_of(number) - step
        early = grows or step == self.total_steps
        return event if self.steps_of(number) and (left == 0 or (early and left > 0)) else None

    def judge(self, event: GrowthEvent, lineage: Lineage, step: int, loss: float) -> str:
        """What to say of a growth.

        Args:
            loss: on the held-out batch, now.

        Raises:
            TrainingError, RollBackError: when it has not recovered and the recipe says so.
        """
        assert event.loss_before is not None, "a growth of a run has been judged before it"
        rise = loss - event.loss_before
        many = f"{step - event.step} step{'s' if step - event.step > 1 else ''}"
        said = (
            f"{many} after growing to {event.to_layers} layers the loss on the held-out batch is "
            f"{loss:.4f}, and was {event.loss_before:.4f} before"
        )
        if rise <= self.section.max_rise:
            return said
        number = len(lineage.events) - 1
        so_far = len([one for one in lineage.roll_backs if one.growth == number])
        said += f": {rise:.4f} nats more, where growth.watchdog.max_rise allows {self.section.max_rise:g}"
        young = step == self.total_steps and step < event.step + self.steps_of(number)
        if self.section.action == "warn" or young:
            return f"{said}, but the run ends before it is due" if young else said
        if self.section.action == "stop":
            raise TrainingError(f"{said}. The small model's checkpoint is {event.source}")
        if so_far >= self.section.max_roll_backs:
            raise TrainingError(
                f"{said}, after {so_far} roll-back{'s' if so_far != 1 else ''}. The small model's checkpoint is "
                f"{event.source}; change the growth, or growth.watchdog.max_roll_backs"
            )
        roll_back = RollBack(
            growth=number,
            step=event.step,
            noticed_at=step,
            loss_before=event.loss_before,
            loss_then=loss,
            postponed_to=event.step + self.steps_of(number),
        )
        if roll_back.postponed_to >= self.total_steps:
            raise TrainingError(
                f"{said}. A roll-back would leave no steps to grow in; the small model is {event.source}"
            )
        raise RollBackError(
            "the growth",
            lambda manifest: replace(manifest, held_out_loss=None, roll_back=asdict(roll_back)),
            event.source,
        )
