"""The phases of a run: from one growth to the next, each with its model, mesh, batch and recipe.

A growth may also change the `[parallelism]` table, the batch, the sequence length and the number of ranks. A phase's
recipe has those changes of all growths before it, so what reads it (stages, batches, checks) need not know of growth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.checks import check_recipe
from titan_growth.config.schema.recipe import Recipe, TrainingConfig
from titan_growth.growth.chain import Chain
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.schedule import Pace
from titan_growth.layout.mesh_shape import BatchShape, MeshShape, resolve_batch, resolve_mesh
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module
from titan_growth.stages.base import PlanContext, Stage, Transition
from titan_growth.stages.flaws import ask
from titan_growth.stages.order import stages_of
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings

BATCH_KEYS = ("global_batch_size", "local_batch_size", "seq_len")
"""Keys of `[training]` that a growth may change."""


@dataclass(frozen=True)
class Phase:
    """A run between two growths."""

    recipe: Recipe
    """As it holds in this phase, with `training.global_batch_size` resolved."""
    config: DecoderConfig
    mesh_shape: MeshShape
    stages: list[Stage]
    num_accumulation_steps: int
    growth_map: GrowthMap | None
    """The growth that made the model; None in the first phase."""
    mask_steps: int = 0
    """Steps over which that growth's mask opens."""

    @property
    def tokens_per_step(self) -> int:
        """Target positions of one optimizer step on all ranks together, masked ones included; at first, under a
        batch schedule."""
        return self.recipe.training.global_batch_size * self.recipe.training.seq_len

    @property
    def pace(self) -> Pace:
        """What steps add to the run's counters in this phase."""
        training = self.recipe.training
        return Pace(BatchSizes.of(training), training.seq_len, self.config.flops_per_token(training.seq_len))

    def context(self, device_type: str) -> PlanContext:
        """The context that stages are checked and described in, without devices."""
        recipe, family = self.recipe, family_module(self.recipe.model.name)
        shape, seq_len = self.mesh_shape, recipe.training.seq_len
        return PlanContext(self.config, shape, device_type, seq_len, family, transition=self.transition(0))

    def check(self, device_type: str, found: Findings) -> None:
        """Reports what the stages of this phase find, each thing once."""
        context = self.context(device_type)
        for stage in self.stages:
            ask(stage, context, found)

    def shadows(self, device_type: str) -> list[str]:
        """The kinds of shadow weights that stages keep."""
        context = self.context(device_type)
        return [stage.name for stage in self.stages if stage.keeps_shadow and stage.enabled(context)]

    def transition(self, step: int) -> Transition | None:
        """The growth that made this phase's model, after a step."""
        return None if self.growth_map is None else Transition(self.growth_map, self.mask_steps, step)


def recipe_in_phase(recipe: Recipe, num_growths: int) -> Recipe:
    """The recipe with the changes of its first growths."""
    changes: dict[str, Any] = {}
    for planned in recipe.growth.active_stages[:num_growths]:
        if planned.parallelism is not None:
            recipe = recipe.model_copy(update={"parallelism": planned.parallelism})
        changes |= {key: getattr(planned, key) for key in BATCH_KEYS if getattr(planned, key) is not None}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)}) if changes else recipe


def phases_of(
    recipe: Recipe,
    chain: Chain,
    found: Findings,
    *,
    num_ranks: int,
    device_type: str,
    first_phase: int,
    derived_batch: int | None,
) -> list[Phase]:
    """The phases of a run. Past ones are made, but not checked, and the ranks that they asked for no longer apply.

    Args:
        num_ranks: of the phase that the run is in.
        first_phase: the phase that the run is in, or starts with.
        derived_batch: what a global_batch_size of -1 was resolved to when the run was first started.
    """
    phases: list[Phase] = []
    changed = ""  # key of the last growth that has changed mesh or batch
    for number, planned in enumerate([None, *recipe.growth.active_stages]):
        if planned is not None and planned.changes_layout:
            changed = f"growth.stages.{number - 1}: "
        if planned is not None and planned.num_ranks is not None and number > first_phase:
            num_ranks = planned.num_ranks
        own = Findings()
        now = recipe_in_phase(recipe, number)
        shape = resolve_mesh(now.parallelism, num_ranks, own) or MeshShape(dp_shard=num_ranks)
        batch = _batch_of(now.training, shape, derived_batch, own)
        if now.training.global_batch_size == -1:
            derived_batch = batch.global_batch_size  # once: later phases and other meshes keep it
        training = now.training.model_copy(update={"global_batch_size": batch.global_batch_size})
        now = now.model_copy(update={"training": training})
        phase = Phase(
            now,
            chain.configs[number],
            shape,
            stages_of(now),
            batch.num_accumulation_steps,
            growth_map=chain.maps[number - 1] if number else None,
            mask_steps=(planned.mask_steps or 0) if planned is not None else 0,
        )
        phases.append(phase)
        if number < first_phase:
            continue
        if planned is not None and planned.parallelism is not None:
            check_recipe(now, own)
        if not own.problems:
            phase.check(device_type, own)
        _report(own.problems, found.problems, changed)
        _report(own.warnings, found.warnings, changed)
    return phases


def _batch_of(training: TrainingConfig, shape: MeshShape, derived: int | None, found: Findings) -> BatchShape:
    """The batch of a phase; one that does not fit the mesh is reported, and taken as it is."""
    size = derived if training.global_batch_size == -1 and derived else training.global_batch_size
    own = Findings()
    batch = resolve_batch(size, training.local_batch_size, shape, own)
    if training.batch_schedule:  # which sizes a phase has to fit is known once its steps are: run/batch_schedule.py
        per_step = training.local_batch_size * shape.dp_degree
        return batch or BatchShape(size, max(1, size // per_step))
    if not found.problems:  # else the mesh does not exist
        hint = "It was derived at the run's first start: give it in the recipe, or name another job.dump_folder"
        given = size == training.global_batch_size
        found.problems += [problem if given else replace(problem, hint=hint) for problem in own.problems]
    return batch or BatchShape(size, 1)


def _report(own: list[Problem], known: list[Problem], changed: str) -> None:
    """Adds findings of a phase that are not those of an earlier one, under the key of the growth that brings them."""
    seen = {(problem.key.rsplit(": ")[-1], problem.message) for problem in known}
    for problem in own:
        if (problem.key, problem.message) not in seen:
            known.append(replace(problem, key=f"{changed}{problem.key}"))
