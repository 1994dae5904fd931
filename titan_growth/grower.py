"""Growth in the middle of a run.

    the small model's checkpoint -> build in the next phase -> read, or learn -> verify -> loss after

The trainer saves and releases the small model first, then takes over the grown one. Nothing is written until the grown
model is verified, so after a crash anywhere in here the run resumes at the small model and grows to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.distributed as dist

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import GrowthEvent, Lineage, Progress
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.engine.engine import Microbatch
from titan_growth.growth.apply import carry_out, learn_growth
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.verify import check_preserved
from titan_growth.models.roles import shadow_kinds
from titan_growth.run.data import RunData
from titan_growth.run.plan import RunPlan
from titan_growth.run.runtime import PhaseRuntime
from titan_growth.tools.collectives import on_rank0
from titan_growth.tools.device import Device
from titan_growth.tools.logs import logger


class StoppedWhileLearningError(Exception):
    """The run was asked to stop during a learning phase; it resumes from the checkpoint before the growth."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know about the next step."""

    num_tokens: int
    """Valid tokens of the global batch."""
    stop: bool
    """Some rank was asked to stop."""


Agree = Callable[[PhaseRuntime, list[Microbatch]], Agreed]


@dataclass(frozen=True)
class Grown:
    """A growth that has been verified."""

    runtime: PhaseRuntime
    progress: Progress
    """Counters after the growth: a learning phase consumes data."""
    event: GrowthEvent


@dataclass
class LearningSteps:
    """The training steps of a learned growth. They consume data but do not count as steps of the run."""

    runtime: PhaseRuntime
    progress: Progress
    agree: Agree

    def __call__(self) -> float:
        """Forward and backward on the next batch, without an optimizer step; returns the loss.

        Raises:
            StoppedWhileLearningError: on every rank, when any rank was asked to stop.
        """
        runtime = self.runtime
        runtime.engine.model.weights_replaced()
        batch = runtime.data.next_batch()
        agreed = self.agree(runtime, batch)
        if agreed.stop:
            raise StoppedWhileLearningError
        loss = runtime.engine.forward_backward(batch, agreed.num_tokens)
        self.progress = self.progress.learned(
            tokens=agreed.num_tokens,
            flops=agreed.num_tokens * runtime.flops_per_token,
            samples=runtime.data.cursor - self.progress.samples,
        )
        return loss.item()


class Grower:
    """Carries out a run's growths on this rank."""

    def __init__(self, plan: RunPlan, run_data: RunData, device: Device) -> None:
        self.plan = plan
        self.run_data = run_data
        self.device = device

    def grow(self, source: StepFolder, progress: Progress, lineage: Lineage, agree: Agree, began: float) -> Grown:
        """Builds and fills the run's next model. The small one has already been released.

        Args:
            source: the small model's checkpoint of this step.
            agree: called before each step of a learning phase.
            began: `time.perf_counter()` at the start of the growth.

        Raises:
            StoppedWhileLearningError: on every rank.
            CheckpointError, GrowthError: on every rank, when the small model cannot be read or the grown one is wrong.
        """
        planned = self.plan.growth_plan.planned[len(lineage.events)]
        growth = self.plan.growth_plan.chain.maps[len(lineage.events)]
        event = self._event(planned, growth, source, progress, lineage)
        growing = lineage.grown(event)
        runtime = PhaseRuntime(self.plan, self.run_data, self.device, lineage=growing, progress=progress)
        try:
            seed = self.plan.seed + 1_000_003 * len(growing.events)
            if growth.learned:
                steps = LearningSteps(runtime, progress, agree)
                event = self._learn(event, planned, growth, source, steps, seed)
                progress = steps.progress
            else:
                stored = on_rank0(lambda: shadow_kinds(SafeReader(source.path).tensor_entries()))
                tensors = runtime.tensors(optimizer=planned.optimizer_state != "reset", shadows=stored)
                num_bytes = carry_out(
                    source.path, tensors, growth, planned, family=runtime.recipe.model.name, seed=seed
                )
                runtime.start_shadows(tensors, f"{source.path.name} has none")
                event = replace(event, bytes_read=num_bytes)
            loss_after = runtime.held_out_loss(progress)
            self._check_preserved(planned, growth, source, loss_after, holds_out=runtime.validator.blocks is not None)
        except BaseException:
            runtime.close()
            raise
        return Grown(runtime, progress, replace(event, loss_after=loss_after, seconds=time.perf_counter() - began))

    def _event(
        self, planned: PlannedGrowth, growth: GrowthMap, source: StepFolder, progress: Progress, lineage: Lineage
    ) -> GrowthEvent:
        """The event, as far as it is known before the growth."""
        assert source.manifest.held_out_loss is not None, "the checkpoint that a model grows from has its loss"
        return GrowthEvent(
            step=progress.step,
            tokens=progress.tokens,
            flops=progress.flops,
            operator=planned.operator,
            stage=planned.model_dump(exclude_defaults=True),
            from_sizes=growth.before.sizes,
            to_sizes=growth.after.sizes,
            layer_map=growth.layers,
            source=source.path.name,
            mesh=str(self.plan.phases[len(lineage.events) + 1].mesh_shape),
            num_ranks=dist.get_world_size(),
            loss_before=source.manifest.held_out_loss,
        )

    def _learn(
        self,
        event: GrowthEvent,
        planned: PlannedGrowth,
        growth: GrowthMap,
        source: StepFolder,
        steps: LearningSteps,
        seed: int,
    ) -> GrowthEvent:
        """Learns the growth's maps on the next batches; the returned event records how it went."""
        runtime = steps.runtime
        learning, num_bytes = learn_growth(
            source.path,
            growth,
            planned,
            runtime.optimizer.parameters,
            family=runtime.recipe.model.name,
            seed=seed,
            device=self.device.torch,
            train_step=steps,
        )
        runtime.engine.model.weights_replaced()
        runtime.start_shadows((), "the growth was learned")
        return replace(event, learning=learning, bytes_read=num_bytes)

    def _check_preserved(
        self, planned: PlannedGrowth, growth: GrowthMap, source: StepFolder, loss_after: float, *, holds_out: bool
    ) -> None:
        """Raises GrowthError if a function-preserving operator did not preserve the function."""
        if not holds_out and growth.tolerance is not None and planned.changes_layout:
            logger.warning("nothing is held out and the batch has changed: losses before and after are not comparable")
            return
        assert source.manifest.held_out_loss is not None, "the checkpoint that a model grows from has its loss"
        check_preserved(planned.operator, growth, source.manifest.held_out_loss, loss_after, self.plan.recipe.training)
