"""The state of a run on this rank: counters, past growths, and what trains in the present phase.

`save` writes it as a checkpoint, `load` reads it back.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import GrowthEvent, Lineage, Progress
from titan_growth.checkpoint.loading import load
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.loader import to_toml
from titan_growth.engine.state import rng_tensors, set_rng, stored_rng
from titan_growth.models.roles import shadow_kinds
from titan_growth.run.data import RunData
from titan_growth.run.initial import open_initial
from titan_growth.run.plan import RunPlan
from titan_growth.run.runtime import PhaseRuntime
from titan_growth.run.stability import Stability
from titan_growth.tools.device import Device
from titan_growth.tools.logs import logger


class RunState:
    """The state of one run.

    Args:
        run_data: the prepared corpus.
    """

    def __init__(self, plan: RunPlan, run_data: RunData, device: Device) -> None:
        self.plan = plan
        self.run_data = run_data
        self.device = device
        self.progress = Progress()
        self.lineage = Lineage()
        self.losses: list[float] = []
        """The last training losses, where the next growth depends on their slope."""
        self.stability = Stability(plan.recipe.stability, holds_out=run_data.validation_blocks(plan.recipe) is not None)
        self.seconds = 0.0
        """Wall-clock seconds of the run before this process."""
        self._runtime: PhaseRuntime | None = None

    @property
    def runtime(self) -> PhaseRuntime:
        """What trains in the present phase."""
        assert self._runtime is not None, "nothing has been built: load first"
        return self._runtime

    @property
    def is_complete(self) -> bool:
        """Whether the last step has been taken."""
        return self.progress.step >= self.plan.recipe.training.steps

    def growth_is_due(self) -> bool:
        """Whether the model grows before the next step."""
        if self.plan.first_phase > len(self.lineage.events):
            return True  # resumed from the checkpoint of a growth
        return self.plan.growth_plan.due(self.progress, self.lineage, self.losses) is not None

    def advance(self, num_tokens: int, loss: Tensor) -> None:
        """Counts a step that has been taken."""
        window = self.plan.growth_plan.window_after(len(self.lineage.events))
        if window and not self.stability.skipped:
            self.losses = [*self.losses, loss.item()][-window:]
        self.progress = self.progress.advanced(
            tokens=num_tokens,
            flops=num_tokens * self.runtime.flops_per_token,
            samples=self.runtime.data.cursor - self.progress.samples,
        )

    def has_grown(self, runtime: PhaseRuntime, progress: Progress, event: GrowthEvent) -> None:
        """Takes over a grown model; what the small model's losses were for starts over."""
        self._runtime, self.progress, self.lineage = runtime, progress, self.lineage.grown(event)
        self.losses = []
        self.stability.forget()

    # ---- building ------------------------------------------------------------------------------------------------

    def build(self, *, seed: int | None = None) -> PhaseRuntime:
        """Builds what the present phase trains with; `seed` fills it with fresh weights."""
        self._runtime = PhaseRuntime(
            self.plan, self.run_data, self.device, lineage=self.lineage, progress=self.progress, seed=seed
        )
        return self._runtime

    def release(self) -> None:
        """Frees the model, if there is one, before a larger one is built."""
        self.close()
        self._runtime = None
        gc.collect()
        self.device.free_memory()

    def close(self) -> None:
        """Stops the data workers. A run that was stopped before it could grow has none."""
        if self._runtime is not None:
            self._runtime.close()

    # ---- loading and saving --------------------------------------------------------------------------------------

    def load(self, checkpoint: StepFolder | None) -> None:
        """Loads a checkpoint, or `checkpoint.initial_load_path`, or makes fresh weights.

        Raises:
            CheckpointError: when it cannot be read, or does not fit.
        """
        torch.manual_seed(self.plan.seed + dist.get_rank())
        section = self.plan.recipe.checkpoint
        if checkpoint is not None:
            self._resume(checkpoint)
            if section.initial_load_path is not None:
                logger.warning("checkpoint.initial_load_path is ignored: the run has checkpoints of its own")
        elif section.initial_load_path is not None and section.enable:
            initial = open_initial(section, self.plan.growth_plan)
            self.progress, self.lineage, self.seconds = initial.progress, initial.lineage, initial.seconds
            runtime = self.build()
            model_only = section.initial_load_model_only
            stored = set() if model_only else shadow_kinds(SafeReader(initial.path).tensor_entries())
            tensors = runtime.tensors(optimizer=not model_only, shadows=stored)
            initial.load(tensors, runtime.model_config, self.plan.recipe)
            runtime.start_shadows(tensors, f"none is loaded from {initial.path.name}")
        else:
            self.build(seed=self.plan.seed)

    def _resume(self, checkpoint: StepFolder) -> None:
        manifest = checkpoint.manifest
        self.progress, self.lineage = manifest.progress, checkpoint.lineage()
        self.losses, self.seconds = manifest.recent_losses, manifest.seconds
        self.stability.restore(manifest.stability)
        reader = SafeReader(checkpoint.path)
        rng = stored_rng(dist.get_rank(), set(reader.tensor_entries()))
        tensors = dict(rng)
        runtime = None
        if self.plan.first_phase == len(self.lineage.events):
            runtime = self.build()
            stored = shadow_kinds(reader.tensor_entries())
            tensors |= runtime.tensors(optimizer=True, shadows=stored)
            for kind in sorted(stored - {shadow.kind for shadow in runtime.engine.model.shadows}):
                logger.info("%s of %s is dropped: the recipe keeps none", kind, checkpoint.path.name)
        else:
            logger.info("the model grows at once, so the small one is not built again")
        load(reader, tensors)
        if runtime is not None:
            runtime.start_shadows(tensors, f"{checkpoint.path.name} has none")
        set_rng(dist.get_rank(), rng)
        logger.info("resumed from %s", checkpoint.path)

    def save(self, checkpointer: CheckpointManager, *, growing: bool, metrics_offset: int, seconds: float) -> None:
        """Writes and commits a checkpoint of this step, in the background under `checkpoint.async_mode`.

        Args:
            growing: the model grows from it.
            metrics_offset: bytes of metrics.jsonl so far.
            seconds: wall-clock seconds of the run so far.
        """
        runtime, step = self.runtime, self.progress.step
        model_only = self.is_complete and self.plan.recipe.checkpoint.last_save_model_only
        manifest = Manifest(
            progress=self.progress,
            num_layers=runtime.model_config.num_layers,
            num_ranks=dist.get_world_size(),
            mesh=str(runtime.mesh.shape),
            model_only=model_only,
            permanent=growing or checkpointer.is_permanent(step),
            metrics_offset=metrics_offset,
            seconds=seconds,
            held_out_loss=runtime.held_out_loss(self.progress) if growing else None,
            recent_losses=self.losses,
            stability=self.stability.state,
            data=self.run_data.fingerprints(),
        )
        tensors = runtime.tensors(optimizer=not model_only)
        if not model_only:
            tensors |= rng_tensors(dist.get_rank())
        recipe_toml = to_toml(self.plan.recipe)
        checkpointer.saver.save(manifest, tensors, recipe_toml=recipe_toml, lineage_json=self.lineage.to_json())
