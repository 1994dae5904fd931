"""The trainer: fit, grow, save.

`fit` is the whole run. Its state (`run/state.py`) is loaded first; each phase has a runtime of its own
(`run/runtime.py`); the grower builds the next phase's model from a checkpoint. Parallelism and precision are stages:
the trainer only calls an engine.
"""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.data.loader import batch_hash, sample_digests
from titan_growth.engine.engine import Microbatch, num_valid_tokens, sum_over_ranks
from titan_growth.grower import Agreed, Grower, StoppedWhileLearningError
from titan_growth.liveness.stop_signal import StopSignal
from titan_growth.metrics.layers import LayersRecord
from titan_growth.metrics.observers import Observers
from titan_growth.metrics.records import GrowthRecord, StepRecord, ValidationRecord
from titan_growth.run.runtime import PhaseRuntime
from titan_growth.run.state import RunState
from titan_growth.run.watchdog import Watchdog
from titan_growth.tools.collectives import gather_objects, set_timeout
from titan_growth.tools.errors import TrainingError, require_finite
from titan_growth.tools.logs import logger


class Trainer:
    """One run on this rank.

    Args:
        state: already loaded.
        observers: metrics and profiler of this rank.
        stop: set when the run should save and stop early.
    """

    def __init__(
        self, state: RunState, *, checkpointer: CheckpointManager, observers: Observers, stop: StopSignal
    ) -> None:
        self.state = state
        self.plan = state.plan
        self.checkpointer = checkpointer
        self.observers = observers
        self.stop = stop
        self.grower = Grower(state.plan, state.run_data, state.device)
        self.watchdog = Watchdog.of(state.plan)
        self.wanted_ranks: int | None = None
        """The number of ranks to continue with, once the run has saved and stopped for a resize."""

    @property
    def progress(self) -> Progress:
        """The run's counters."""
        return self.state.progress

    @property
    def lineage(self) -> Lineage:
        """The run's growths."""
        return self.state.lineage

    @property
    def runtime(self) -> PhaseRuntime:
        """The current phase's runtime."""
        return self.state.runtime

    def fit(self) -> bool:
        """Trains to the last step. Returns False if the run was asked to stop early (and has saved, if it saves)."""
        gc.disable()  # collected after steps, on all ranks at once, so that no rank stalls the others
        try:
            self._loop()
            with self.observers.meter.pause("checkpoint"):
                self.checkpointer.saver.wait()
        finally:
            gc.enable()
        if not self.state.is_complete:
            return False
        self.plan.growth_plan.require_complete(self.progress, self.lineage)
        return True

    def _loop(self) -> None:
        stopped, slow = False, True  # the first step of a phase is slow: process groups, kernels, compilation
        self.observers.start()
        while not (stopped or self.state.is_complete):
            if self.state.growth_is_due():
                if self._any_rank_stops() or self._wants_other_ranks() or not self.grow():
                    return  # the step is saved; the next start grows
                slow = True
            stopped = self.train_step()
            if slow:
                self._set_timeout(self.plan.recipe.comm.train_timeout_seconds)
            slow = False

    def train_step(self) -> bool:
        """One optimizer step and everything that belongs to it. Returns whether any rank was asked to stop.

        Raises:
            TrainingError: the run cannot continue.
            RollBackError: the run has to continue from an earlier checkpoint.
        """
        state, runtime, step = self.state, self.runtime, self.progress.step + 1
        with self.observers.meter.data():
            batch = runtime.data.next_batch()
        agreed = self.agree(runtime, batch)
        runtime.engine.model.before_step(step)
        loss = runtime.engine.forward_backward(batch, agreed.num_tokens)
        lr = self.plan.schedule(step, self.lineage.grown_at)
        fresh = self.plan.schedule.fresh_share(step, self.lineage.grown_at)
        grad_norm = state.stability.update(runtime.optimizer, self.progress, runtime.data.cursor, loss, lr, fresh)
        if not state.stability.skipped:
            runtime.engine.model.after_optimizer_step()
        state.advance(agreed.num_tokens, loss)
        self.observers.meter.count_step(tokens=agreed.num_tokens, flops_per_token=runtime.flops_per_token)
        growing = not state.is_complete and state.growth_is_due()
        saving = self.checkpointer.is_due(step, last=state.is_complete, wanted=growing or agreed.stop)
        self.record(batch, loss, grad_norm, lr, saving)
        self.after_step(growing, saving)
        return agreed.stop

    def agree(self, runtime: PhaseRuntime, batch: list[Microbatch]) -> Agreed:
        """What all ranks must know before a step: the size of the batch, and whether any rank was asked to stop.

        Raises:
            CheckpointError: on every rank, when a background save has failed on any rank.
        """
        num_tokens = num_valid_tokens(batch) if runtime.mesh.speaks_for_its_data else 0
        flags = [int(self.stop.is_set), int(self.checkpointer.saver.failed)]
        num_tokens, stop, save_failed = sum_over_ranks(torch.tensor([num_tokens, *flags])).tolist()
        if save_failed:
            self.checkpointer.saver.wait()
        if num_tokens == 0:
            raise TrainingError(f"step {self.progress.step + 1}: the global batch has no tokens to train on")
        return Agreed(num_tokens, stop > 0)

    def record(self, batch: list[Microbatch], loss: Tensor, grad_norm: Tensor, lr: float, saving: bool) -> None:
        """Logs the step if it is due; a non-finite loss or gradient ends the run before it is saved."""
        if by_layer := self.runtime.engine.model.layer_metrics():
            record = LayersRecord.of(by_layer, self.runtime.phase.growth_map)
            self.observers.recorder.record(self.progress, record)
        step, skipped = self.progress.step, self.state.stability.skipped
        logged = self.observers.recorder.should_log(step) or bool(skipped)
        if not (logged or saving):
            return
        values = (loss.item(), grad_norm.item())
        if logged:
            digest = None
            if self.plan.recipe.debug.log_batch_hash:
                digests = sample_digests(batch) if self.runtime.mesh.speaks_for_its_data else []
                digest = batch_hash(gather_objects(digests))
            step_record = StepRecord(
                loss=values[0],
                grad_norm=values[1],
                lr=lr,
                num_layers=self.runtime.model_config.num_layers,
                batch_hash=digest,
                skipped=skipped or None,
                **self.runtime.engine.model.step_metrics(),
            )
            self.observers.recorder.record(self.progress, step_record)
        self.state.stability.require_finite(step, *values)

    def after_step(self, growing: bool, saving: bool) -> None:
        """Validation, the watchdog's check of the last growth, and the save, each if due."""
        runtime, step = self.runtime, self.progress.step
        if runtime.validator.due(step) or (growing and runtime.recipe.validation.enable):
            with self.observers.meter.pause("validation"):
                record = ValidationRecord.of(runtime.validator.run(runtime.engine))
                self.observers.recorder.record(self.progress, record)
            require_finite(step, **record.losses)
        if event := self.watchdog.due(step, self.lineage, grows=growing):
            with self.observers.meter.pause("validation"):
                loss = runtime.held_out_loss(self.progress)
            logger.info("%s", self.watchdog.judge(event, self.lineage, step, loss))
        # After validation, so that a resume finds the validation line already written.
        if saving:
            self.save(growing=growing)
        self.observers.end_of_step()
        if step % runtime.recipe.training.gc_freq == 0:
            gc.collect()

    def save(self, *, growing: bool) -> None:
        """Saves this step on all ranks; `growing`: the model grows from this checkpoint."""
        with self.observers.meter.pause("checkpoint"):
            self.state.save(
                self.checkpointer,
                growing=growing,
                metrics_offset=self.observers.metrics_offset,
                seconds=self.observers.recorder.seconds,
            )

    # ---- growth --------------------------------------------------------------------------------------------------

    def grow(self) -> bool:
        """Replaces the model with the grown one, read from this step's checkpoint.

        Returns False if the run was asked to stop during a learning phase. The model is gone then; the run resumes
        from that checkpoint.
        """
        began = time.perf_counter()
        # Ranks may be minutes apart in reading and verifying, and the grown model is compiled again.
        self._set_timeout(self.plan.recipe.comm.init_timeout_seconds)
        with self.observers.meter.pause("growth"):
            source = self.growth_checkpoint()
            self.state.release()
            try:
                grown = self.grower.grow(source, self.progress, self.lineage, self.agree, began)
            except StoppedWhileLearningError:
                return False
            self.state.has_grown(grown.runtime, grown.progress, grown.event)
            self.observers.recorder.record(grown.event, GrowthRecord.of(grown.event))
        return True

    def growth_checkpoint(self) -> StepFolder:
        """The small model's checkpoint of this step, made permanent; normally the loop has just saved it."""
        self.checkpointer.saver.wait()
        saved = self.checkpointer.saver.last_saved
        if saved is None or saved.step != self.progress.step:
            self.save(growing=True)
            self.checkpointer.saver.wait()
            saved = self.checkpointer.saver.last_saved
        assert saved is not None, "a save that did not fail leaves a checkpoint"
        loss = saved.manifest.held_out_loss
        return self.checkpointer.make_permanent(self.runtime.held_out_loss(self.progress) if loss is None else loss)

    def _wants_other_ranks(self) -> bool:
        """Whether the due growth needs a different number of ranks; if so, its checkpoint is ready."""
        wanted = self.plan.growth_plan.planned[len(self.lineage.events)].num_ranks
        if wanted in (None, dist.get_world_size()):
            return False
        self.growth_checkpoint()
        self.wanted_ranks = wanted
        return True

    def _any_rank_stops(self) -> bool:
        return bool(sum_over_ranks(torch.tensor(int(self.stop.is_set))).item())

    def _set_timeout(self, seconds: int) -> None:
        if dist.get_world_size() > 1:
            set_timeout(seconds)
