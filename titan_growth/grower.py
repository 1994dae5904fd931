"""Growing in the middle of a run: the trainer's `grow`, and what it takes.

    save the way back -> let go -> build in the next phase -> read, or learn -> verify -> loss after -> on with training

A part of `Trainer` in a file of its own. It needs the trainer's whole state, since a growth replaces most of it.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import GrowthEvent, Lineage, Progress
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.data import BatchLoader
from titan_growth.engine.engine import Engine, Microbatch
from titan_growth.engine.optimizer import Optimizer
from titan_growth.growth.apply import carry_out, learn_growth
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.verify import check_preserved
from titan_growth.metrics.observers import Observers
from titan_growth.models.config import DecoderConfig
from titan_growth.run.phases import Phase
from titan_growth.run.plan import RunPlan
from titan_growth.run.stability import Stability
from titan_growth.run.validator import Validator
from titan_growth.tools.device import Device
from titan_growth.tools.logs import logger


class StoppedWhileLearningError(Exception):
    """The run was asked to stop during a learning phase; the checkpoint before the growth is what it goes on from."""


class GrowsMidRun(ABC):
    """The growth of a run. What is declared here is the trainer's."""

    plan: RunPlan
    recipe: Recipe
    device: Device
    checkpointer: CheckpointManager
    observers: Observers
    validator: Validator
    progress: Progress
    lineage: Lineage
    losses: list[float]
    stability: Stability
    model_config: DecoderConfig
    engine: Engine
    optimizer: Optimizer
    data: BatchLoader

    @property
    @abstractmethod
    def seed(self) -> int: ...

    @property
    @abstractmethod
    def phase(self) -> Phase: ...

    @abstractmethod
    def _build(self, *, seed: int | None) -> None: ...

    @abstractmethod
    def _loader(self) -> BatchLoader: ...

    @abstractmethod
    def _agree(self, batch: list[Microbatch]) -> tuple[int, bool]: ...

    @abstractmethod
    def _tensors(self, *, optimizer: bool) -> dict[str, Tensor]: ...

    @abstractmethod
    def save(self, *, growing: bool) -> None: ...

    def grow(self, stage: PlannedGrowth) -> None:
        """Replaces the model by the grown one, read from the checkpoint that this step was saved in.

        Nothing is written before the grown model has proved right, so a crash anywhere in here resumes at the small
        model and grows again to the same bits.

        Raises:
            StoppedWhileLearningError: on every rank; progress and lineage are then as they were, the model is gone.
        """
        began = time.perf_counter()
        with self.observers.meter.pause("growth"):
            source = self._way_back()
            growth = self.plan.growth.map_after(len(self.lineage.events))
            assert source.manifest.held_out_loss is not None, "the way back of a growth has its loss"
            event = GrowthEvent(
                step=self.progress.step,
                tokens=self.progress.tokens,
                flops=self.progress.flops,
                operator=stage.operator,
                stage=stage.model_dump(exclude_defaults=True),
                from_sizes=growth.before.sizes,
                to_sizes=growth.after.sizes,
                layer_map=growth.layers,
                source=source.path.name,
                mesh=str(self.plan.phases[len(self.lineage.events) + 1].mesh_shape),
                num_ranks=dist.get_world_size(),
                loss_before=source.manifest.held_out_loss,
            )
            self._release()
            self.lineage = replace(self.lineage, events=(*self.lineage.events, event))
            self.losses = []
            self.stability.forget()
            self._build(seed=None)
            seed = self.seed + 1_000_003 * len(self.lineage.events)
            if growth.learned:
                before = self.progress
                try:
                    event = replace(event, **self._learn(source, growth, stage, seed))
                except StoppedWhileLearningError:
                    self.progress, self.lineage = before, replace(self.lineage, events=self.lineage.events[:-1])
                    raise
            else:
                tensors = self._tensors(optimizer=stage.optimizer_state != "reset")
                read = carry_out(source.path, tensors, growth, stage, family=self.recipe.model.name, seed=seed)
                event = replace(event, bytes_read=read.num_bytes)
            loss_after = self._held_out_loss()
            if self.validator.blocks is None and growth.tolerance is not None and stage.changes_layout:
                logger.warning("nothing is held out, and the batch has changed: losses before and after do not compare")
            else:
                check_preserved(stage.operator, growth, source.manifest.held_out_loss, loss_after, self.recipe.training)
            seconds = time.perf_counter() - began
            event = replace(event, loss_after=loss_after, seconds=seconds)
            self.lineage = replace(self.lineage, events=(*self.lineage.events[:-1], event))
            self.observers.record_growth(event)

    def _learn(self, source: StepFolder, growth: GrowthMap, stage: PlannedGrowth, seed: int) -> dict[str, Any]:
        """Learns the maps of a growth on the batches that come next; what the event is to say of it."""

        def train_step() -> float:
            self.engine.model.after_optimizer_step()
            batch = self.data.next_batch()
            num_tokens, stop = self._agree(batch)
            if stop:
                raise StoppedWhileLearningError
            loss = self.engine.forward_backward(batch, num_tokens)
            flops = num_tokens * self.model_config.flops_per_token(self.phase.recipe.training.seq_len)
            samples = self.data.cursor - self.progress.samples
            self.progress = self.progress.learned(tokens=num_tokens, flops=flops, samples=samples)
            return loss.item()

        learning, num_bytes = learn_growth(
            source.path,
            growth,
            stage,
            self.optimizer.parameters,
            family=self.recipe.model.name,
            seed=seed,
            device=self.device.torch,
            train_step=train_step,
        )
        self.engine.model.after_optimizer_step()
        return {"learning": learning, "bytes_read": num_bytes}

    def _way_back(self) -> StepFolder:
        """The small model's checkpoint of this very step, which stays for good; normally the loop has just saved it."""
        self.checkpointer.wait()
        saved = self.checkpointer.last_saved
        if saved is None or saved.step != self.progress.step:
            self.save(growing=True)
            self.checkpointer.wait()
            saved = self.checkpointer.last_saved
        assert saved is not None, "a save that has not failed leaves a checkpoint"
        loss = saved.manifest.held_out_loss
        return self.checkpointer.make_permanent(self._held_out_loss() if loss is None else loss)

    def _held_out_loss(self) -> float:
        if self.validator.blocks is not None:
            return self.validator.one_batch(self.engine)
        # Nothing is held out: the next global batch, which has not been trained on, serves.
        upcoming = self._loader()
        try:
            return self.engine.evaluate(upcoming.next_batch())
        finally:
            upcoming.close()

    def _release(self) -> None:
        """Lets go of the model, if there is one, before the larger one is built."""
        if hasattr(self, "engine"):
            self.data.close()
            del self.engine, self.optimizer
        gc.collect()
        self.device.free_memory()
