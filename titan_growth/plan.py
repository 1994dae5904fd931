"""What a recipe comes to on so many ranks, worked out before anything is started.

`plan_run` is pure: no device, no process group, no file. The preflight and every rank call it, so they cannot disagree
about what a recipe means, and all problems of a recipe are found in one place and reported together.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_growth.checkpoint.lineage import Progress
from titan_growth.config.schema import Recipe
from titan_growth.growth.schedule import GrowthPlan, plan_growth, timing_problems
from titan_growth.lr_scheduler import LRSchedule
from titan_growth.mesh import MeshShape, resolve_batch, resolve_mesh
from titan_growth.models.config import ModelConfig
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.stages.base import Stage, StageContext, stages_of
from titan_growth.tools.errors import Problem


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that follows from its recipe and the number of ranks."""

    recipe: Recipe
    """With `training.global_batch_size` resolved."""
    target: ModelConfig
    growth: GrowthPlan
    mesh_shape: MeshShape
    stages: list[Stage]
    num_accumulation_steps: int
    schedule: LRSchedule

    @property
    def tokens_per_step(self) -> int:
        """Target positions of one optimizer step on all ranks together, masked ones included."""
        return self.recipe.training.global_batch_size * self.recipe.training.seq_len

    def describe(self, device_type: str) -> list[str]:
        """The plan in a few lines, for the log; `plan_report` has the long version."""
        training, steps = self.recipe.training, self.num_accumulation_steps
        return [
            f"model {self.recipe.model.name} {self.recipe.model.flavor}: {self.target.num_layers} layers, "
            f"{self.target.num_params:,} parameters in the end",
            f"mesh: {self.mesh_shape}; batch: {training.global_batch_size} sequences of {training.seq_len} tokens "
            f"({steps} accumulation step{'s' if steps > 1 else ''})",
            *self.stage_lines(device_type),
            *self.growth_lines(),
        ]

    def stage_lines(self, device_type: str) -> list[str]:
        """The stages in the order they are applied in, and what each of them does."""
        context = stage_context(self.recipe, self.growth.configs[0], self.mesh_shape, device_type)
        active = [stage for stage in self.stages if stage.enabled(context)]
        return [
            "stages: " + (" -> ".join(stage.name for stage in active) or "none"),
            *(f"  {stage.describe(context)}" for stage in active),
        ]

    def growth_lines(self) -> list[str]:
        """One line for each growth."""
        return [
            f"growth at {stage.when}: {stage.operator}{f' x{stage.factor}' if stage.factor else ''}, "
            f"{_change(growth.before, growth.after)}, "
            f"moments {stage.optimizer_state}, learning rate {stage.lr_policy}"
            for stage, growth in zip(self.growth.stages, self.growth.chain.maps, strict=True)
        ]


def _change(before: ModelConfig, after: ModelConfig) -> str:
    """`3 -> 12 layers`, `dim 64 -> 128, n_heads 2 -> 4`."""
    old, new = before.sizes, after.sizes
    changed = [key for key in new if new[key] != old[key]]
    named = [f"{key} {old[key]} -> {new[key]}" for key in changed if key != "n_layers"]
    depth = [f"{old['n_layers']} -> {new['n_layers']} layers"] if "n_layers" in changed else []
    return ", ".join(depth + named)


def stage_context(recipe: Recipe, config: ModelConfig, shape: MeshShape, device_type: str) -> StageContext:
    """The context that stages are checked and described in while nothing is running."""
    return StageContext(config, shape, device_type, recipe.training.seq_len, family_module(recipe.model.name))


def plan_run(
    recipe: Recipe,
    *,
    num_ranks: int,
    device_type: str,
    global_batch_size: int | None = None,
    progress: Progress | None = None,
    num_growths: int = 0,
    elsewhere: bool = False,
) -> tuple[RunPlan | None, list[Problem], list[Problem]]:
    """(plan, problems, warnings); the plan is None when there are problems.

    Args:
        global_batch_size: what -1 was resolved to when the run was first started; None at that first start.
        progress: where the run has come to, and `num_growths` how often it has grown; for a run that is resumed.
        elsewhere: the run is to happen on another machine, so what this one lacks is only warned about.
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []
    target, found = model_config_of(recipe.model)
    problems += found
    shape, found = resolve_mesh(recipe.parallelism, num_ranks)
    problems += found
    training = recipe.training
    if target is not None:
        longest = max(training.seq_len, recipe.validation.seq_len or 0)
        if longest > target.max_seq_len:
            key = "training.seq_len" if longest == training.seq_len else "validation.seq_len"
            hint = "Shorten it, or raise model.max_seq_len"
            problems.append(Problem(key, f"{longest} is more than model.max_seq_len = {target.max_seq_len}", hint))
        growth, found = plan_growth(recipe.growth, target)
        problems += found
    else:
        growth = None
    schedule = LRSchedule(recipe.lr_scheduler, lr=recipe.optimizer.lr, steps=training.steps, growth=recipe.growth)
    for key, warmup, length in schedule.clamped_warmups():
        warnings.append(Problem(key, f"{warmup} is longer than the {length} steps it is for, and is cut to that"))
    num_accumulation_steps = 1
    if shape is not None:
        asked = training.global_batch_size
        batch = global_batch_size if asked == -1 and global_batch_size else asked
        batch, num_accumulation_steps, found = resolve_batch(batch, training.local_batch_size, shape)
        problems += found
        if found and batch != asked:
            hint = "It was derived at the run's first start: give it in the recipe, or name another job.dump_folder"
            problems[-1] = Problem(problems[-1].key, problems[-1].message, hint)
        in_tokens = any(stage.when.unit == "tokens" for stage in recipe.growth.active_stages)
        if not found and in_tokens and recipe.comm.mode == "default":
            problems += timing_problems(
                recipe.growth,
                steps=training.steps,
                tokens_per_step=batch * training.seq_len,
                progress=progress,
                num_growths=num_growths,
            )
        recipe = recipe.model_copy(update={"training": training.model_copy(update={"global_batch_size": batch})})
    problems += _device_problems(recipe, device_type)
    (warnings if elsewhere else problems).extend(_machine_problems(recipe))
    stages = stages_of(recipe)
    if target is None or shape is None or growth is None:
        return None, problems, warnings
    for config in growth.configs:
        context = stage_context(recipe, config, shape, device_type)
        for stage in stages:
            if stage.enabled(context):
                problems += [problem for problem in stage.check(context) if problem not in problems]
                warnings += [warning for warning in stage.warnings(context) if warning not in warnings]
    if problems:
        return None, problems, warnings
    return RunPlan(recipe, target, growth, shape, stages, num_accumulation_steps, schedule), [], warnings


def _device_problems(recipe: Recipe, device_type: str) -> list[Problem]:
    problems = []
    if recipe.profiling.enable_memory_snapshot and device_type != "cuda":
        message = "memory snapshots exist on CUDA only, and this run is on the CPU"
        problems.append(Problem("profiling.enable_memory_snapshot", message, "Set it to false"))
    return problems


def _machine_problems(recipe: Recipe) -> list[Problem]:
    """What this machine lacks."""
    problems = []
    if recipe.metrics.enable_wandb:
        from importlib.util import find_spec

        if find_spec("wandb") is None:
            message = "needs the package wandb, which is not installed"
            hint = "Run pip install 'titan_growth[wandb]', or set it to false"
            problems.append(Problem("metrics.enable_wandb", message, hint))
    return problems
