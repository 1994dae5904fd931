"""The phases of a run: from one growth to the next, each with its model, its mesh, its batch and its recipe.

A growth may change more than the model: it may name a new `[parallelism]` table, another batch, a longer
sequence, another number of ranks. What holds in a phase is the recipe with those changes of all growths before it, so
everything that reads a recipe (stages, batches, checks) reads the phase's, and need not know of growth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from titan_growth.config.checks import check_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import Chain
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.layout.mesh_shape import BatchShape, MeshShape, resolve_batch, resolve_mesh
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module
from titan_growth.stages.base import PlanContext, Stage, Transition
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
    """What the model has come from; None in the first phase."""
    mask_steps: int = 0
    """Steps over which what that growth has added opens."""

    @property
    def tokens_per_step(self) -> int:
        """Target positions of one optimizer step on all ranks together, masked ones included."""
        return self.recipe.training.global_batch_size * self.recipe.training.seq_len

    def context(self, device_type: str) -> PlanContext:
        """The context that stages are checked and described in while nothing is running."""
        recipe, family = self.recipe, family_module(self.recipe.model.name)
        shape, seq_len = self.mesh_shape, recipe.training.seq_len
        return PlanContext(self.config, shape, device_type, seq_len, family, transition=self.transition(0))

    def transition(self, step: int) -> Transition | None:
        """The growth that came after a step, for the model of this phase."""
        return None if self.growth_map is None else Transition(self.growth_map, self.mask_steps, step)


def recipe_in_phase(recipe: Recipe, num_growths: int) -> Recipe:
    """The recipe with the changes of its first growths."""
    changes: dict[str, Any] = {}
    for planned in recipe.growth.active_stages[:num_growths]:
        if planned.parallelism is not None:
            recipe = recipe.model_copy(update={"parallelism": planned.parallelism})
        changes |= {key: getattr(planned, key) for key in BATCH_KEYS if getattr(planned, key) is not None}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)}) if changes else recipe


def ranks_in_phases(recipe: Recipe, num_ranks: int, first_phase: int) -> list[int]:
    """The number of ranks of each phase, when the run is at one of them on `num_ranks` ranks.

    Past phases' rank requests no longer apply: the resume decides.
    """
    wanted = [num_ranks]
    for number, planned in enumerate(recipe.growth.active_stages, start=1):
        wanted.append(wanted[-1] if planned.num_ranks is None or number <= first_phase else planned.num_ranks)
    return wanted


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
    """The phases of a run. Those that lie behind it are made, but not checked.

    Args:
        first_phase: the phase that the run is in, or starts with.
        derived_batch: what a global_batch_size of -1 was resolved to when the run was first started.
    """
    phases: list[Phase] = []
    for number, ranks in enumerate(ranks_in_phases(recipe, num_ranks, first_phase)):
        own = Findings()
        now = recipe_in_phase(recipe, number)
        shape = resolve_mesh(now.parallelism, ranks, own) or MeshShape(dp_shard=ranks)
        batch = _batch_of(now, shape, derived_batch, own)
        if now.training.global_batch_size == -1:
            derived_batch = batch.global_batch_size  # once: later phases and other meshes keep it
        training = now.training.model_copy(update={"global_batch_size": batch.global_batch_size})
        now = now.model_copy(update={"training": training})
        phase = _phase(now, chain, number, shape, batch.num_accumulation_steps)
        phases.append(phase)
        if number >= first_phase:
            _check_phase(phase, device_type, own, new_layout=_new_layout(recipe, number))
            _report(own, number, recipe, found)
    return phases


def _batch_of(recipe: Recipe, shape: MeshShape, derived: int | None, found: Findings) -> BatchShape:
    """The batch of a phase; one that does not fit the mesh is reported, and taken as it is."""
    training = recipe.training
    size = derived if training.global_batch_size == -1 and derived else training.global_batch_size
    own = Findings()
    batch = resolve_batch(size, training.local_batch_size, shape, own)
    if found.problems:
        own = Findings()  # about a mesh that does not exist
    hint = "It was derived at the run's first start: give it in the recipe, or name another job.dump_folder"
    for problem in own.problems:
        found.problem(problem.key, problem.message, problem.hint if size == training.global_batch_size else hint)
    return batch or BatchShape(size, 1)


def _phase(recipe: Recipe, chain: Chain, number: int, shape: MeshShape, num_accumulation_steps: int) -> Phase:
    planned = recipe.growth.active_stages[number - 1] if number else None
    return Phase(
        recipe,
        chain.configs[number],
        shape,
        stages_of(recipe),
        num_accumulation_steps,
        growth_map=chain.maps[number - 1] if number else None,
        mask_steps=planned.mask_steps or 0 if planned is not None else 0,
    )


def _new_layout(recipe: Recipe, number: int) -> bool:
    """Whether a phase has a `[parallelism]` table of its own."""
    return number > 0 and recipe.growth.active_stages[number - 1].parallelism is not None


def _check_phase(phase: Phase, device_type: str, found: Findings, *, new_layout: bool) -> None:
    """The recipe of a phase, and then its stages."""
    if new_layout:
        check_recipe(phase.recipe, found)
    if found.problems:
        return
    context = phase.context(device_type)
    for stage in phase.stages:
        if stage.enabled(context):
            found.problems += [problem for problem in stage.check(context) if problem not in found.problems]
            found.warnings += [warning for warning in stage.warnings(context) if warning not in found.warnings]


def _report(own: Findings, number: int, recipe: Recipe, found: Findings) -> None:
    """Adds the findings of a phase that are not those of an earlier one."""
    found.problems += _in_phase(own.problems, number, recipe, found.problems)
    found.warnings += _in_phase(own.warnings, number, recipe, found.warnings)


def _in_phase(own: list[Problem], number: int, recipe: Recipe, known: list[Problem]) -> Iterator[Problem]:
    """Problems of a phase that are not those of an earlier one, under the key of the growth that brings them."""
    growths = recipe.growth.active_stages[:number]
    changed = [index for index, planned in enumerate(growths) if planned.changes_layout]
    seen = {(problem.key.rsplit(": ")[-1], problem.message) for problem in known}
    for problem in own:
        if (problem.key, problem.message) in seen:
            continue
        key = f"growth.stages.{changed[-1]}: {problem.key}" if changed else problem.key
        yield Problem(key, problem.message, problem.hint)
