"""The phases of a run: from one growth to the next, each with its model, its mesh, its batch and its recipe.

A stage of `[growth]` may change more than the model: it may name a new `[parallelism]` table, another batch, a longer
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
from titan_growth.layout.mesh_shape import MeshShape, resolve_batch, resolve_mesh
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module
from titan_growth.stages.base import PlanContext, Stage, Transition
from titan_growth.stages.order import stages_of
from titan_growth.tools.errors import Problem

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
    growth: GrowthMap | None
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
        return None if self.growth is None else Transition(self.growth, self.mask_steps, step)


def recipe_in_phase(recipe: Recipe, num_growths: int) -> Recipe:
    """The recipe with the changes of its first growths."""
    changes: dict[str, Any] = {}
    for stage in recipe.growth.active_stages[:num_growths]:
        if stage.parallelism is not None:
            recipe = recipe.model_copy(update={"parallelism": stage.parallelism})
        changes |= {key: getattr(stage, key) for key in BATCH_KEYS if getattr(stage, key) is not None}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)}) if changes else recipe


def ranks_in_phases(recipe: Recipe, num_ranks: int, first_phase: int) -> list[int]:
    """The number of ranks of each phase, when the run is at one of them on `num_ranks` ranks.

    What a phase that has come asked for does not matter any more: whoever resumes decides on how many ranks.
    """
    wanted = [num_ranks]
    for number, stage in enumerate(recipe.growth.active_stages, start=1):
        wanted.append(wanted[-1] if stage.num_ranks is None or number <= first_phase else stage.num_ranks)
    return wanted


def phases_of(
    recipe: Recipe, chain: Chain, *, num_ranks: int, device_type: str, first_phase: int, derived_batch: int | None
) -> tuple[list[Phase], list[Problem], list[Problem]]:
    """(phases, problems, warnings) of a run. Phases that lie behind it are made, but not asked for problems.

    Args:
        first_phase: the phase that the run is in, or starts with.
        derived_batch: what a global_batch_size of -1 was resolved to when the run was first started.
    """
    phases: list[Phase] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    batch = derived_batch
    for number, ranks in enumerate(ranks_in_phases(recipe, num_ranks, first_phase)):
        mine = recipe_in_phase(recipe, number)
        shape, found = resolve_mesh(mine.parallelism, ranks)
        if shape is None:
            shape = MeshShape(dp_shard=ranks)
        asked = mine.training.global_batch_size
        size = batch if asked == -1 and batch else asked
        size, accumulation, odd = resolve_batch(size, mine.training.local_batch_size, shape)
        if odd and size != asked and not found:
            hint = "It was derived at the run's first start: give it in the recipe, or name another job.dump_folder"
            odd[-1] = Problem(odd[-1].key, odd[-1].message, hint)
        found += odd if not found else []
        # Derived once: later phases and other meshes keep it.
        batch = batch or (size if asked == -1 else None)
        mine = mine.model_copy(update={"training": mine.training.model_copy(update={"global_batch_size": size})})
        growth = chain.maps[number - 1] if number else None
        mask_steps = recipe.growth.active_stages[number - 1].mask_steps or 0 if number else 0
        phase = Phase(mine, chain.configs[number], shape, stages_of(mine), accumulation, growth, mask_steps)
        phases.append(phase)
        if number < first_phase:
            continue
        said: list[Problem] = []
        if number and recipe.growth.active_stages[number - 1].parallelism is not None:
            found += list(check_recipe(mine, said))
        if not found:
            context = phase.context(device_type)
            for stage in phase.stages:
                if stage.enabled(context):
                    found += [problem for problem in stage.check(context) if problem not in found]
                    said += [warning for warning in stage.warnings(context) if warning not in said]
        problems += _in_phase(found, number, recipe, problems)
        warnings += _in_phase(said, number, recipe, warnings)
    return phases, problems, warnings


def _in_phase(found: list[Problem], number: int, recipe: Recipe, known: list[Problem]) -> Iterator[Problem]:
    """Problems of a phase that are not those of an earlier one, under the key of the growth that brings them."""
    stages = recipe.growth.active_stages[:number]
    changed = [index for index, stage in enumerate(stages) if stage.changes_layout]
    seen = {(problem.key.rsplit(": ")[-1], problem.message) for problem in known}
    for problem in found:
        if (problem.key, problem.message) in seen:
            continue
        key = f"growth.stages.{changed[-1]}: {problem.key}" if changed else problem.key
        yield Problem(key, problem.message, problem.hint)
