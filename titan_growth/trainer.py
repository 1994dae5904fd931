"""The trainer: build, fit, grow.

`fit` is the whole story of a run. What it calls is built by `_build`, which start-up, resume and growth all go through.
The trainer knows of no parallelism and no precision; those are stages, and it calls an engine.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.checkpoint.folder import Manifest, StepFolder, open_step
from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.config.loader import to_toml
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.data import BatchLoader, batch_hash, sample_digests
from titan_growth.engine.build import build
from titan_growth.engine.engine import Microbatch, num_valid_tokens, sum_over_ranks
from titan_growth.engine.make_engine import make_engine
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.state import model_tensors, optimizer_tensors, rng_tensors, set_rng, stored_rng
from titan_growth.grower import GrowsMidRun, StoppedWhileLearningError
from titan_growth.growth.apply import fresh_elements
from titan_growth.layout.mesh import Mesh
from titan_growth.liveness.stop_signal import StopSignal
from titan_growth.metrics.observers import Observers
from titan_growth.run.data import RunData
from titan_growth.run.initial import initial_notes, initial_reader, initial_state
from titan_growth.run.phases import Phase
from titan_growth.run.plan import RunPlan
from titan_growth.run.resume import check_same_growths
from titan_growth.run.stability import Stability
from titan_growth.run.validator import Validator
from titan_growth.run.watchdog import Watchdog
from titan_growth.tools.collectives import gather_objects, on_rank0, set_timeout
from titan_growth.tools.device import Device
from titan_growth.tools.errors import CheckpointError, TrainingError, require_finite
from titan_growth.tools.logs import logger


class Trainer(GrowsMidRun):
    """One run, on this rank.

    Args:
        plan: the checked recipe on this number of ranks.
        run_data: the prepared corpus.
        checkpoint: what to resume from; None starts from scratch (or from `checkpoint.initial_load_path`).
        observers: metrics and profiler of this rank.
        stop: set when the run should save and end early.
    """

    def __init__(
        self,
        plan: RunPlan,
        *,
        run_data: RunData,
        device: Device,
        checkpointer: CheckpointManager,
        checkpoint: StepFolder | None,
        observers: Observers,
        stop: StopSignal,
    ) -> None:
        self.plan = plan
        self.recipe = plan.recipe
        self.run_data = run_data
        self.device = device
        self.checkpointer = checkpointer
        self.observers = observers
        self.stop = stop
        self.progress = Progress()
        self.lineage = Lineage()
        self.losses: list[float] = []
        """The last training losses, when the next growth depends on their slope."""
        self.wanted_ranks: int | None = None
        """The number of ranks that the run is to go on with, once it has saved and stopped for that."""
        self.watchdog = Watchdog(
            self.recipe.growth.watchdog,
            plan.growth.stages,
            self.recipe.lr_scheduler.warmup_steps,
            self.recipe.training.steps,
        )
        holds_out = run_data.validation_blocks(self.recipe) is not None
        self.stability = Stability(self.recipe.stability, checkpoint, holds_out=holds_out)
        self._start(checkpoint)

    # ---- start ---------------------------------------------------------------------------------------------------

    def _start(self, checkpoint: StepFolder | None) -> None:
        torch.manual_seed(self.seed + dist.get_rank())
        initial = self.recipe.checkpoint.initial_load_path
        if checkpoint is not None:
            self.progress = checkpoint.manifest.progress
            self.lineage = checkpoint.lineage()
            self.losses = checkpoint.manifest.recent_losses
            tensors = stored_rng(dist.get_rank(), self.checkpointer.stored_names(checkpoint.path))
            rng = dict(tensors)
            if self.plan.first_phase == len(self.lineage.events):
                self._build(seed=None)
                tensors |= self._tensors(optimizer=True)
            else:
                logger.info("the model grows at once, so the small one is not built again")
            self.checkpointer.load(checkpoint.path, tensors)
            set_rng(dist.get_rank(), rng)
            logger.info("resumed from %s", checkpoint.path)
            if initial is not None:
                logger.warning("checkpoint.initial_load_path is ignored: the run has checkpoints of its own")
        elif initial is not None and self.recipe.checkpoint.enable:
            self._start_from_another_run()
        else:
            self._build(seed=self.seed)

    @property
    def phase(self) -> Phase:
        """The phase that the run has come to."""
        return self.plan.phases[len(self.lineage.events)]

    @property
    def seed(self) -> int:
        """The run's seed."""
        assert self.recipe.debug.seed is not None, "the seed has not been resolved"
        return self.recipe.debug.seed

    def _build(self, *, seed: int | None) -> None:
        """Model, engine, optimizer and batches of the phase that the lineage has come to."""
        phase = self.phase
        self.model_config = phase.config
        self.mesh = Mesh.get(phase.mesh_shape, self.device.type)
        held_out = self.run_data.validation_blocks(self.recipe)
        self.validator = Validator(self.recipe.validation, held_out, self.mesh, self.recipe.training.steps)
        self.data = self._loader()
        model = build(
            self.model_config,
            family=self.recipe.model.name,
            mesh=self.mesh,
            stages=phase.stages,
            device=self.device.torch,
            dtype=getattr(torch, self.recipe.training.dtype),
            seq_len=max(
                phase.recipe.training.seq_len, self.recipe.training.seq_len, self.recipe.validation.seq_len or 0
            ),
            seed=seed,
            transition=phase.transition(self.lineage.grown_at[-1] if self.lineage.events else 0),
        )
        model.before_step(self.progress.step)
        self.engine = make_engine(model, self.device.torch)
        self.optimizer = Optimizer.of(model, self.recipe.optimizer, max_norm=self.recipe.training.max_norm)
        if phase.growth is not None:
            stage = self.plan.growth.stages[len(self.lineage.events) - 1]
            if stage.lr_policy == "rewarm_new":
                self.optimizer.fresh = fresh_elements(
                    self.optimizer.parameters, phase.growth, stage, family=self.recipe.model.name
                )

    def _loader(self) -> BatchLoader:
        """The global batches of this phase that have not been trained on."""
        base_seq_len = self.recipe.training.seq_len
        return self.run_data.loader(self.phase.recipe, self.mesh, self.progress.samples, base_seq_len)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Trains to the last step. Returns False when the run was asked to stop early (and has saved, if it saves)."""
        gc.disable()  # collected below, on all ranks at once, so that no rank stalls the others at its own moment
        try:
            self._loop()
            with self.observers.meter.pause("checkpoint"):
                self.checkpointer.wait()
        finally:
            gc.enable()
        if self.progress.step < self.recipe.training.steps:
            return False
        self.plan.growth.require_complete(self.progress, self.lineage)
        return True

    def _loop(self) -> None:
        stopped = False
        starting = True  # whatever is slow the first time is still to come: process groups, kernels, compilation
        self.observers.start()
        while self.progress.step < self.recipe.training.steps and not stopped:
            if stage := self._due():
                if self._any_rank_stops():
                    return  # the step is saved; the next start grows
                if stage.num_ranks not in (None, dist.get_world_size()):
                    self._way_back()
                    self.wanted_ranks = stage.num_ranks
                    return
                if dist.get_world_size() > 1:
                    # Ranks may be minutes apart in reading and verifying, and the grown model compiles anew.
                    set_timeout(self.recipe.comm.init_timeout_seconds)
                try:
                    self.grow(stage)
                except StoppedWhileLearningError:
                    return
                starting = True
            with self.observers.meter.data():
                batch = self.data.next_batch()
            num_tokens, stopped = self._agree(batch)
            self.engine.model.before_step(self.progress.step + 1)
            loss = self.engine.forward_backward(batch, num_tokens)
            lr = self.plan.schedule(self.progress.step + 1, self.lineage.grown_at)
            fresh = self.plan.schedule.fresh_share(self.progress.step + 1, self.lineage.grown_at)
            grad_norm = self.stability.update(self.optimizer, self.progress, self.data.cursor, loss, lr, fresh)
            self.engine.model.after_optimizer_step()
            self._advance(num_tokens, loss)
            growing = self._grows_next()
            saving = self._save_due(growing or stopped)
            self._record(batch, loss, grad_norm, lr, saving)
            self._after_step(growing, saving)
            if starting and dist.get_world_size() > 1:
                set_timeout(self.recipe.comm.train_timeout_seconds)
            starting = False

    def _agree(self, batch: list[Microbatch]) -> tuple[int, bool]:
        """(valid tokens of the global batch, whether any rank was asked to stop).

        Raises:
            CheckpointError: on every rank, when a save in the background has failed on any.
        """
        mine = num_valid_tokens(batch) if self.mesh.speaks_for_its_data else 0
        flags = [int(self.stop.is_set), int(self.checkpointer.save_failed)]
        num_tokens, stop, save_failed = sum_over_ranks(torch.tensor([mine, *flags])).tolist()
        if save_failed:
            self.checkpointer.wait()
        if num_tokens == 0:
            raise TrainingError(f"step {self.progress.step + 1}: the global batch has no token to train on")
        return num_tokens, stop > 0

    def _any_rank_stops(self) -> bool:
        return bool(sum_over_ranks(torch.tensor(int(self.stop.is_set))).item())

    def _due(self) -> PlannedGrowth | None:
        if self.plan.first_phase > len(self.lineage.events):
            return self.plan.growth.stages[len(self.lineage.events)]  # resumed from the checkpoint of a growth
        return self.plan.growth.due(self.progress, self.lineage, self.losses)

    def _grows_next(self) -> bool:
        return self._due() is not None and self.progress.step < self.recipe.training.steps

    def _advance(self, num_tokens: int, loss: Tensor) -> None:
        flops_per_token = self.model_config.flops_per_token(self.phase.recipe.training.seq_len)
        window = self.plan.growth.window_after(len(self.lineage.events))
        if window and not self.stability.skipped:
            self.losses = [*self.losses, loss.item()][-window:]
        self.progress = self.progress.advanced(
            tokens=num_tokens, flops=num_tokens * flops_per_token, samples=self.data.cursor - self.progress.samples
        )
        self.observers.count_step(tokens=num_tokens, flops_per_token=flops_per_token)

    def _record(self, batch: list[Microbatch], loss: Tensor, grad_norm: Tensor, lr: float, saving: bool) -> None:
        """Logs the step when it is to be logged; a loss or gradient that is not finite ends the run before a save."""
        step = self.progress.step
        skipped = self.stability.skipped
        if not (self.observers.should_log(step) or saving or skipped):
            return
        values = (loss.item(), grad_norm.item())
        if self.observers.should_log(step) or skipped:
            digest = None
            if self.recipe.debug.log_batch_hash:
                mine = sample_digests(batch) if self.mesh.speaks_for_its_data else []
                digest = batch_hash(gather_objects(mine))
            self.observers.record_step(self.progress, *values, lr, self.model_config.num_layers, digest, skipped)
        self.stability.require_finite(step, *values)

    def _after_step(self, growing: bool, saving: bool) -> None:
        step = self.progress.step
        if self.validator.due(step) or (growing and self.recipe.validation.enable):
            with self.observers.meter.pause("validation"):
                validation_loss = self.validator.run(self.engine)
                self.observers.record_validation(self.progress, validation_loss)
            require_finite(step, validation_loss=validation_loss)
        if event := self.watchdog.due(step, self.lineage, grows=growing):
            with self.observers.meter.pause("validation"):
                loss = self._held_out_loss()
            logger.info("%s", self.watchdog.judge(event, self.lineage, step, loss))
        # After the validation, so that a resume finds its line already written.
        if saving:
            self.save(growing=growing)
        self.observers.end_of_step()
        if step % self.recipe.training.gc_freq == 0:
            gc.collect()

    def close(self) -> None:
        """Stops the workers that make batches. A run that was stopped before it could grow has none."""
        if hasattr(self, "data"):
            self.data.close()

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save_due(self, wanted: bool) -> bool:
        section, step = self.recipe.checkpoint, self.progress.step
        if not section.enable or section.load_only:
            return False
        first = section.enable_first_step_checkpoint and step == 1
        due = step % section.interval == 0 or self._is_permanent or step == self.recipe.training.steps
        return wanted or first or due

    @property
    def _is_permanent(self) -> bool:
        interval = self.recipe.checkpoint.permanent_interval
        return interval > 0 and self.progress.step % interval == 0

    def save(self, *, growing: bool) -> None:
        """Writes and commits a checkpoint of this step, or begins to (`checkpoint.async_mode`).

        Args:
            growing: the model grows from it.
        """
        with self.observers.meter.pause("checkpoint"):
            section, last = self.recipe.checkpoint, self.progress.step == self.recipe.training.steps
            model_only = last and section.last_save_model_only
            manifest = Manifest(
                progress=self.progress,
                num_layers=self.model_config.num_layers,
                num_ranks=dist.get_world_size(),
                mesh=str(self.mesh.shape),
                model_only=model_only,
                permanent=growing or self._is_permanent,
                metrics_offset=self.observers.metrics_offset,
                seconds=self.observers.seconds,
                held_out_loss=self._held_out_loss() if growing else None,
                recent_losses=self.losses,
                stability=self.stability.state,
                data=self.run_data.fingerprints(),
            )
            tensors = self._tensors(optimizer=not model_only)
            if not model_only:
                tensors |= rng_tensors(dist.get_rank())
            lineage_json = self.lineage.to_json()
            self.checkpointer.save(manifest, tensors, recipe_toml=to_toml(self.recipe), lineage_json=lineage_json)

    def _tensors(self, *, optimizer: bool) -> dict[str, Tensor]:
        tensors = model_tensors(self.engine.model.parts)
        return tensors | optimizer_tensors(self.optimizer) if optimizer else tensors

    def _start_from_another_run(self) -> None:
        """Takes another run's weights, or all of its state, from `checkpoint.initial_load_path`."""
        section = self.recipe.checkpoint
        path, self.progress, self.lineage = on_rank0(lambda: initial_state(section, checksums=False))
        folder = on_rank0(lambda: open_step(path))
        if folder is not None and (damage := self.checkpointer.damage(folder)):
            raise CheckpointError(f"{path.name} refused: {damage}")
        check_same_growths(path, self.lineage, self.plan.growth)
        if folder is not None and not section.initial_load_model_only:
            self.observers.metrics.seconds_before = folder.manifest.seconds
        self._build(seed=None)
        tensors = self._tensors(optimizer=not section.initial_load_model_only)
        reader = initial_reader(path, self.recipe.model.name, self.model_config)
        self.checkpointer.load(path, tensors, reader=reader, casts=section.initial_load_model_only)
        for line in initial_notes(reader, tensors):
            logger.warning("%s", line)
        logger.info("started from %s of %s", "the weights" if section.initial_load_model_only else "all state", path)
