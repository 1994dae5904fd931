"""What a recipe comes to on so many ranks, worked out before anything is started.

`plan_run` is pure: no device, no process group, no file. The preflight and every rank call it, so they cannot disagree
about what a recipe means, and all problems of a recipe are found in one place and reported together.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_growth.checkpoint.history import Progress
from titan_growth.config.duration import Duration
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import chain_of
from titan_growth.growth.schedule import GrowthPlan, plan_growth
from titan_growth.layout.mesh_shape import MeshShape, resolve_batch, resolve_mesh
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.phases import Phase, phases_of, recipe_in_phase
from titan_growth.stages.base import Stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.packages import missing_package


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that follows from its recipe and the number of ranks."""

    recipe: Recipe
    """With `training.global_batch_size` resolved, as it holds at the start of the run."""
    target: DecoderConfig
    growth: GrowthPlan
    phases: list[Phase]
    """The run from growth to growth; one more than there are growths."""
    first_phase: int
    """The phase that this start of the run begins in."""
    schedule: LRSchedule

    @property
    def seed(self) -> int:
        """The seed of the run."""
        assert self.recipe.debug.seed is not None, "the seed has not been decided"
        return self.recipe.debug.seed

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.training.steps

    @property
    def base_seq_len(self) -> int:
        """The sequence length that the data cursor counts in."""
        return self.recipe.training.seq_len

    @property
    def phase(self) -> Phase:
        """The phase that this start of the run begins in."""
        return self.phases[self.first_phase]

    @property
    def mesh_shape(self) -> MeshShape:
        """The mesh that this start of the run begins on."""
        return self.phase.mesh_shape

    @property
    def stages(self) -> list[Stage]:
        """The stages of the phase that this start of the run begins in."""
        return self.phase.stages

    @property
    def num_accumulation_steps(self) -> int:
        """Microbatches of a step of a rank, in that phase."""
        return self.phase.num_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Target positions of one optimizer step in that phase, masked ones included."""
        return self.phase.tokens_per_step

    def describe(self, device_type: str) -> list[str]:
        """The plan in a few lines, for the log; `plan_report` has the long version."""
        training, steps = self.phase.recipe.training, self.num_accumulation_steps
        return [
            f"model {self.recipe.model.name} {self.recipe.model.flavor}: {self.target.num_layers} layers, "
            f"{self.target.num_params:,} parameters in the end",
            f"mesh: {self.mesh_shape}; batch: {training.global_batch_size} sequences of {training.seq_len} tokens "
            f"({steps} accumulation step{'s' if steps > 1 else ''})",
            *stage_lines(self.phase, device_type),
            *self.growth_lines(),
        ]

    def growth_lines(self) -> list[str]:
        """One line for each growth."""
        return [
            f"growth at {_point(stage, point)}: {stage.operator}{f' x{stage.factor}' if stage.factor else ''}, "
            f"{_change(growth.before, growth.after)}, "
            f"moments {stage.optimizer_state}, learning rate {stage.lr_policy}{_layout(stage, phase)}"
            for stage, point, growth, phase in zip(
                self.growth.stages, self.growth.points, self.growth.chain.maps, self.phases[1:], strict=True
            )
        ]


def stage_lines(phase: Phase, device_type: str) -> list[str]:
    """The stages of a phase in the order they are applied in, and what each of them does."""
    context = phase.context(device_type)
    active = [stage for stage in phase.stages if stage.enabled(context)]
    return [
        "stages: " + (" -> ".join(stage.name for stage in active) or "none"),
        *(f"  {stage.describe(context)}" for stage in active),
    ]


def _point(stage: PlannedGrowth, point: Duration) -> str:
    """`80 steps`, `300 steps (25%)`."""
    return str(point) if stage.when == point else f"{point} ({stage.at})"


def _layout(stage: PlannedGrowth, phase: Phase) -> str:
    """What else a growth changes."""
    training = phase.recipe.training
    changes = []
    if stage.parallelism is not None or stage.num_ranks is not None:
        changes.append(f"mesh {phase.mesh_shape}")
    if stage.num_ranks is not None:
        changes.append(f"{stage.num_ranks} ranks")
    if stage.global_batch_size is not None or stage.seq_len is not None:
        changes.append(f"batch {training.global_batch_size} x {training.seq_len} tokens")
    return "".join(f", {change}" for change in changes)


def _change(before: DecoderConfig, after: DecoderConfig) -> str:
    """`3 -> 12 layers`, `dim 64 -> 128, n_heads 2 -> 4`."""
    old, new = before.sizes, after.sizes
    changed = [key for key in new if new[key] != old[key]]
    named = [f"{key} {old[key]} -> {new[key]}" for key in changed if key != "n_layers"]
    depth = [f"{old['n_layers']} -> {new['n_layers']} layers"] if "n_layers" in changed else []
    return ", ".join(depth + named)


def plan_run(
    recipe: Recipe,
    *,
    num_ranks: int,
    device_type: str,
    global_batch_size: int | None = None,
    progress: Progress | None = None,
    num_growths: int = 0,
    grows_at_once: bool = False,
    elsewhere: bool = False,
) -> tuple[RunPlan | None, list[Problem], list[Problem]]:
    """(plan, problems, warnings); the plan is None when there are problems.

    Args:
        global_batch_size: what -1 was resolved to when the run was first started; None at that first start.
        progress: where the run has come to, and `num_growths` how often it has grown; for a run that is resumed.
        grows_at_once: the checkpoint that it goes on from was saved at a growth, so it needs the small model no more.
        elsewhere: the run is to happen on another machine, so what this one lacks is only warned about.
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []
    target, found = model_config_of(recipe.model)
    problems += found
    training = recipe.training
    chain = None
    if target is not None:
        longest = max(*(recipe_in_phase(recipe, number).training.seq_len for number in _phase_numbers(recipe)), 0)
        longest = max(longest, recipe.validation.seq_len or 0)
        if longest > target.max_seq_len:
            key = "training.seq_len" if longest == training.seq_len else "validation.seq_len"
            hint = "Shorten it, or raise model.max_seq_len"
            problems.append(Problem(key, f"{longest} is more than model.max_seq_len = {target.max_seq_len}", hint))
        chain, found = chain_of(recipe.growth, target)
        problems += found
    schedule = LRSchedule(recipe.lr_scheduler, lr=recipe.optimizer.lr, steps=training.steps, growth=recipe.growth)
    for key, warmup, length in schedule.clamped_warmups():
        warnings.append(Problem(key, f"{warmup} is longer than the {length} steps it is for, and is cut to that"))
    warnings += _growth_warnings(recipe)
    problems += _device_problems(recipe, device_type)
    (warnings if elsewhere else problems).extend(_machine_problems(recipe))
    if target is None or chain is None:
        # Without a model there is nothing to divide; what is wrong with mesh and batch by themselves can still be said.
        shape, found = resolve_mesh(recipe.parallelism, num_ranks)
        problems += found
        if shape is not None:
            problems += resolve_batch(training.global_batch_size, training.local_batch_size, shape)[2]
        return None, problems, warnings
    here = num_growths
    if grows_at_once and num_growths < len(chain.maps):
        # Its growth needs other ranks: then the run only says so, in the phase that it is still in.
        wanted = recipe.growth.active_stages[num_growths].num_ranks
        here += wanted in (None, num_ranks)
    while True:
        phases, found, said = phases_of(
            recipe,
            chain,
            num_ranks=num_ranks,
            device_type=device_type,
            first_phase=here,
            derived_batch=global_batch_size,
        )
        growth, late, doubtful = plan_growth(
            recipe.growth,
            chain,
            steps=training.steps,
            tokens_per_step=[phase.tokens_per_step for phase in phases],
            seq_lens=[phase.recipe.training.seq_len for phase in phases],
            progress=progress,
            num_growths=num_growths,
        )
        if here == num_growths or growth.reached(num_growths, progress or Progress()):
            break
        here = num_growths  # the recipe has moved the growth to a later point
    problems, warnings = problems + found, warnings + said
    if recipe.comm.mode == "default" and not found:
        problems, warnings = problems + late, warnings + doubtful
    if problems:
        return None, problems, warnings
    return RunPlan(phases[0].recipe, target, growth, phases, here, schedule), [], warnings


def _growth_warnings(recipe: Recipe) -> list[Problem]:
    """What a growth that can be carried out does less well than one would think."""
    found = []
    for index, stage in enumerate(recipe.growth.active_stages):
        if stage.seq_len not in (None, recipe.training.seq_len) and recipe.data.shuffle:
            message = "within an epoch that is shuffled, some of its text comes twice then and some not at all"
            found.append(Problem(f"growth.stages.{index}.seq_len", message, "Set data.shuffle = false to avoid it"))
    watches = recipe.growth.active_stages and recipe.growth.watchdog.action != "warn"
    if watches and not recipe.data.validation_fraction and recipe.validation.dataset_path is None:
        message = "nothing is held out, so the watchdog compares losses of different batches"
        found.append(Problem("growth.watchdog.action", message, "Set data.validation_fraction"))
    return found


def _phase_numbers(recipe: Recipe) -> range:
    return range(len(recipe.growth.active_stages) + 1)


def _device_problems(recipe: Recipe, device_type: str) -> list[Problem]:
    problems = []
    if recipe.profiling.enable_memory_snapshot and device_type != "cuda":
        message = "memory snapshots exist on CUDA only, and this run is on the CPU"
        problems.append(Problem("profiling.enable_memory_snapshot", message, "Set it to false"))
    if recipe.checkpoint.enable and recipe.checkpoint.async_mode == "async_with_pinned_mem" and device_type != "cuda":
        message = "page-locked memory needs CUDA, and this run is on the CPU"
        problems.append(Problem("checkpoint.async_mode", message, 'Set it to "async"'))
    return problems


def _machine_problems(recipe: Recipe) -> list[Problem]:
    """Packages that the recipe needs and this machine lacks. Those of a corpus show when it is opened."""
    wanted = []
    if recipe.metrics.enable_wandb:
        wanted.append(missing_package("metrics.enable_wandb", "wandb", "set it to false"))
    if recipe.model.uses_float8:
        alternative = 'take "quantize.linear.float8" out of it'
        wanted.append(missing_package("model.converters", "torchao", alternative))
    return [problem for problem in wanted if problem is not None]
