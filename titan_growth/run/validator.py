"""Loss on held-out sequences, the same ones at every call and on every mesh."""

from __future__ import annotations

from dataclasses import dataclass

from titan_growth.config.schema.recipe import ValidationConfig
from titan_growth.data.blocks import BlockDataset
from titan_growth.data.loader import ValidationBatches
from titan_growth.engine.engine import Engine
from titan_growth.layout.mesh import Mesh


@dataclass(frozen=True)
class Validator:
    """Evaluates an engine on the validation set, or on one fixed batch of it."""

    section: ValidationConfig
    blocks: BlockDataset | None
    """The held-out sequences; None when nothing is held out."""
    mesh: Mesh
    total_steps: int

    def due(self, step: int) -> bool:
        """Whether a step is followed by a validation: every `freq` steps, and at the last."""
        return self.section.enable and (step % self.section.freq == 0 or step == self.total_steps)

    def run(self, engine: Engine) -> dict[str, float]:
        """Mean loss over the validation set, or over `validation.steps` batches of it.

        Returns:
            Kind of weights -> the loss with them; "" for the model's own, and the others are its shadow weights.
        """
        losses = {"": self._loss(engine)}
        for shadow in engine.model.shadows:
            with engine.model.with_shadow(shadow):
                losses[shadow.kind] = self._loss(engine)
        return losses

    def _loss(self, engine: Engine) -> float:
        limit = None if self.section.steps == -1 else self.section.steps * self.section.local_batch_size
        return engine.evaluate(self._batches(limit))

    def one_batch(self, engine: Engine) -> float:
        """Mean loss over one fixed batch, which growths are judged by."""
        return engine.evaluate(self._batches(self.section.local_batch_size))

    def _batches(self, num_sequences: int | None) -> ValidationBatches:
        assert self.blocks is not None, "nothing is held out"
        return ValidationBatches(
            self.blocks, num_sequences, self.section.local_batch_size, self.mesh.dp_rank, self.mesh.shape.dp_degree
        )
