"""The run plan: what a recipe resolves to on a number of ranks, before anything is started.

`plan_run` is pure: no device, no process group, no file. The preflight and every rank call it, so they cannot disagree
about what a recipe means, and all problems of a recipe are found in one place and reported together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from titan_growth.checkpoint.history import Progress
from titan_growth.config.duration import Duration
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import Chain, chain_of
from titan_growth.growth.schedule import GrowthPlan, plan_growth
from titan_growth.layout.mesh_shape import MeshShape, resolve_batch, resolve_mesh
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.phases import Phase, phases_of, recipe_in_phase
from titan_growth.stages.base import Stage
from titan_growth.tools.findings import Findings
from titan_growth.tools.packages import missing_package


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on from; by default from its beginning."""

    progress: Progress = field(default_factory=Progress)
    num_growths: int = 0
    """How often it has grown."""
    grows_at_once: bool = False
    """The checkpoint was saved at a growth, so the run needs the small model no more."""
    global_batch_size: int | None = None
    """What -1 was resolved to when the run was first started."""


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that follows from its recipe and the number of ranks."""

    recipe: Recipe
    """With `training.global_batch_size` resolved, as it holds at the start of the run."""
    target: DecoderConfig
    growth_plan: GrowthPlan
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
        growths = self.growth_plan
        return [
            f"growth at {_point(planned, point)}: {planned.operator}{f' x{planned.factor}' if planned.factor else ''}, "
            f"{_change(growth_map.before, growth_map.after)}, "
            f"moments {planned.optimizer_state}, learning rate {planned.lr_policy}{_layout(planned, phase)}"
            for planned, point, growth_map, phase in zip(
                growths.planned, growths.points, growths.chain.maps, self.phases[1:], strict=True
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


def _point(planned: PlannedGrowth, point: Duration) -> str:
    """`80 steps`, `300 steps (25%)`."""
    return str(point) if planned.when == point else f"{point} ({planned.at})"


def _layout(planned: PlannedGrowth, phase: Phase) -> str:
    """What else a growth changes."""
    training = phase.recipe.training
    changes = []
    if planned.parallelism is not None or planned.num_ranks is not None:
        changes.append(f"mesh {phase.mesh_shape}")
    if planned.num_ranks is not None:
        changes.append(f"{planned.num_ranks} ranks")
    if planned.global_batch_size is not None or planned.seq_len is not None:
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
    found: Findings,
    *,
    num_ranks: int,
    device_type: str,
    resume: ResumePoint | None = None,
    elsewhere: bool = False,
) -> RunPlan | None:
    """The plan of a run; None when something is wrong with its recipe.

    Args:
        resume: where the run goes on from; None at its first start.
        elsewhere: the run is to happen on another machine, so what this one lacks is only warned about.
    """
    own = Findings()
    target = model_config_of(recipe.model, own)
    if target is not None:
        _check_lengths(recipe, target, own)
    chain = chain_of(recipe.growth, target, own) if target is not None else None
    _warn_of_warmups(recipe, own)
    _warn_of_growths(recipe, own)
    _check_device(recipe, device_type, own)
    _check_machine(recipe, own, elsewhere=elsewhere)
    plan = None
    if chain is None:
        _check_without_model(recipe, num_ranks, own)
    else:
        plan = _lay_out(recipe, chain, own, num_ranks=num_ranks, device_type=device_type, at=resume or ResumePoint())
    found.extend(own)
    return None if own.problems else plan


def _lay_out(
    recipe: Recipe, chain: Chain, found: Findings, *, num_ranks: int, device_type: str, at: ResumePoint
) -> RunPlan:
    """The plan of a run whose models are known."""
    plan_from = partial(_plan_from, recipe, chain, num_ranks=num_ranks, device_type=device_type, at=at)
    first_phase = at.num_growths
    if at.grows_at_once and first_phase < len(chain.maps):
        # A growth that needs other ranks is not carried out here: the run says so, in the phase that it is still in.
        first_phase += recipe.growth.active_stages[first_phase].num_ranks in (None, num_ranks)
    own = Findings()
    plan = plan_from(own, first_phase=first_phase)
    if first_phase != at.num_growths and not plan.growth_plan.reached(at.num_growths, at.progress):
        own = Findings()  # the recipe has moved the growth to a later point
        plan = plan_from(own, first_phase=at.num_growths)
    found.extend(own)
    return plan


def _plan_from(
    recipe: Recipe,
    chain: Chain,
    found: Findings,
    *,
    num_ranks: int,
    device_type: str,
    at: ResumePoint,
    first_phase: int,
) -> RunPlan:
    phases = phases_of(
        recipe,
        chain,
        found,
        num_ranks=num_ranks,
        device_type=device_type,
        first_phase=first_phase,
        derived_batch=at.global_batch_size,
    )
    timing = Findings()
    growth_plan = plan_growth(
        recipe.growth,
        chain,
        timing,
        steps=recipe.training.steps,
        tokens_per_step=[phase.tokens_per_step for phase in phases],
        seq_lens=[phase.recipe.training.seq_len for phase in phases],
        progress=at.progress,
        num_growths=at.num_growths,
    )
    if recipe.comm.mode == "default" and not found.problems:
        found.extend(timing)
    return RunPlan(phases[0].recipe, chain.target, growth_plan, phases, first_phase, LRSchedule.of(recipe))


def _check_without_model(recipe: Recipe, num_ranks: int, found: Findings) -> None:
    """Without a model there is nothing to divide; mesh and batch by themselves can still be wrong."""
    shape = resolve_mesh(recipe.parallelism, num_ranks, found)
    if shape is not None:
        resolve_batch(recipe.training.global_batch_size, recipe.training.local_batch_size, shape, found)


def _check_lengths(recipe: Recipe, target: DecoderConfig, found: Findings) -> None:
    """No sequence is longer than the model's positions."""
    phases = range(len(recipe.growth.active_stages) + 1)
    lengths = [recipe_in_phase(recipe, number).training.seq_len for number in phases]
    longest = max(*lengths, recipe.validation.seq_len or 0)
    if longest > target.max_seq_len:
        key = "training.seq_len" if longest == recipe.training.seq_len else "validation.seq_len"
        hint = "Shorten it, or raise model.max_seq_len"
        found.problem(key, f"{longest} is more than model.max_seq_len = {target.max_seq_len}", hint)


def _warn_of_warmups(recipe: Recipe, found: Findings) -> None:
    for warmup in LRSchedule.of(recipe).clamped_warmups():
        found.warn(warmup.key, f"{warmup.steps} is longer than the {warmup.length} steps it is for, and is cut to that")


def _warn_of_growths(recipe: Recipe, found: Findings) -> None:
    """What a growth that can be carried out does less well than one would think."""
    for index, planned in enumerate(recipe.growth.active_stages):
        if planned.seq_len not in (None, recipe.training.seq_len) and recipe.data.shuffle:
            message = "within an epoch that is shuffled, some of its text comes twice then and some not at all"
            found.warn(f"growth.stages.{index}.seq_len", message, "Set data.shuffle = false to avoid it")
    watches = recipe.growth.active_stages and recipe.growth.watchdog.action != "warn"
    if watches and not recipe.data.validation_fraction and recipe.validation.dataset_path is None:
        message = "nothing is held out, so the watchdog compares losses of different batches"
        found.warn("growth.watchdog.action", message, "Set data.validation_fraction")


def _check_device(recipe: Recipe, device_type: str, found: Findings) -> None:
    if device_type == "cuda":
        return
    if recipe.profiling.enable_memory_snapshot:
        message = "memory snapshots exist on CUDA only, and this run is on the CPU"
        found.problem("profiling.enable_memory_snapshot", message, "Set it to false")
    if recipe.checkpoint.enable and recipe.checkpoint.async_mode == "async_with_pinned_mem":
        message = "page-locked memory needs CUDA, and this run is on the CPU"
        found.problem("checkpoint.async_mode", message, 'Set it to "async"')


def _check_machine(recipe: Recipe, found: Findings, *, elsewhere: bool) -> None:
    """Packages that the recipe needs and this machine lacks; only a warning when the run is to happen elsewhere.

    Those of a corpus show when it is opened.
    """
    report = found.warnings if elsewhere else found.problems
    if recipe.metrics.enable_wandb and (problem := missing_package("metrics.enable_wandb", "wandb", "set it to false")):
        report.append(problem)
    without = 'take "quantize.linear.float8" out of it'
    if recipe.model.uses_float8 and (problem := missing_package("model.converters", "torchao", without)):
        report.append(problem)
