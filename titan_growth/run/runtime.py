"""What trains in one phase of a run: mesh, engine, optimizer, batches and validator, built together.

Start-up, resume and growth all build one of these. A growth drops the small model's before it builds the large one's.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.data.loader import BatchLoader
from titan_growth.engine.build import build
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.pipeline_engine import make_engine
from titan_growth.engine.state import model_tensors, optimizer_tensors
from titan_growth.growth.apply import fresh_elements
from titan_growth.layout.mesh import Mesh
from titan_growth.run.data import RunData
from titan_growth.run.plan import RunPlan
from titan_growth.run.validator import Validator
from titan_growth.tools.device import Device
from titan_growth.tools.logs import logger


class PhaseRuntime:
    """The moving parts of the phase that a lineage has come to.

    Args:
        plan: of the run.
        run_data: the prepared corpus.
        progress: counters of the run; batches go on from its cursor.
        seed: of the initial weights; None leaves them uninitialised, for a model that is about to be loaded.
    """

    def __init__(
        self,
        plan: RunPlan,
        run_data: RunData,
        device: Device,
        *,
        lineage: Lineage,
        progress: Progress,
        seed: int | None = None,
    ) -> None:
        num_growths = len(lineage.events)
        self.plan = plan
        self.run_data = run_data
        self.phase = plan.phases[num_growths]
        self.recipe = self.phase.recipe
        self.model_config = self.phase.config
        self.mesh = Mesh.get(self.phase.mesh_shape, device.type)
        held_out = run_data.validation_blocks(plan.recipe)
        self.validator = Validator(self.recipe.validation, held_out, self.mesh, self.recipe.training.steps)
        self.data = self.loader(progress)
        model = build(
            self.model_config,
            family=self.recipe.model.name,
            mesh=self.mesh,
            stages=self.phase.stages,
            device=device.torch,
            dtype=getattr(torch, self.recipe.training.dtype),
            seq_len=max(self.recipe.training.seq_len, plan.base_seq_len, self.recipe.validation.seq_len or 0),
            seed=seed,
            transition=self.phase.transition(lineage.grown_at[-1] if lineage.events else 0),
        )
        model.before_step(progress.step)
        self.engine = make_engine(model, device.torch)
        self.optimizer = Optimizer.of(model, self.recipe.optimizer, max_norm=self.recipe.training.max_norm)
        if self.phase.growth_map is not None:
            planned = plan.growth_plan.planned[num_growths - 1]
            if planned.lr_policy == "rewarm_new":
                self.optimizer.fresh = fresh_elements(
                    self.optimizer.parameters, self.phase.growth_map, planned, family=self.recipe.model.name
                )

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs of a token in this phase."""
        return self.model_config.flops_per_token(self.recipe.training.seq_len)

    def loader(self, progress: Progress) -> BatchLoader:
        """The global batches of this phase that have not been trained on."""
        return self.run_data.loader(self.recipe, self.mesh, progress, self.plan.base_seq_len)

    def tensors(self, *, optimizer: bool, shadows: Collection[str] | None = None) -> dict[str, Tensor]:
        """This rank's weights, moments if wanted, and shadow weights; the tensors in use, so they can be loaded into.

        Args:
            shadows: the kinds of shadow weights; None for all.
        """
        tensors = model_tensors(self.engine.model.parts)
        for shadow in self.engine.model.shadows:
            if shadows is None or shadow.kind in shadows:
                tensors |= shadow.tensors
        return tensors | optimizer_tensors(self.optimizer) if optimizer else tensors

    def start_shadows(self, filled: Collection[str], why: str) -> None:
        """Makes shadow weights that are not among the filled tensors equal to the weights, and says so."""
        for kind in self.engine.model.start_shadows(filled):
            logger.info("%s starts from the weights: %s", kind, why)

    def held_out_loss(self, progress: Progress) -> float:
        """Mean loss on one batch that a growth is judged by: held out, or else the next one to be trained on."""
        if self.validator.blocks is not None:
            return self.validator.one_batch(self.engine)
        upcoming = self.loader(progress)
        try:
            return self.engine.evaluate(upcoming.next_batch())
        finally:
            upcoming.close()

    def close(self) -> None:
        """Stops the workers that make batches."""
        self.data.close()
