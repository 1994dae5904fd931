"""The run plan: what a recipe resolves to on a number of ranks, before anything is started.

`plan_run` is pure: no device, no process group, no file. The preflight and every rank call it, so they cannot disagree
about what a recipe means, and all problems of a recipe are found in one place and reported together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from titan_growth.checkpoint.history import Progress
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.duration import Duration
from titan_growth.config.schema.growth import GrowthConfig, PlannedGrowth
from titan_growth.config.schema.recipe import (
    CheckpointConfig,
    DataConfig,
    MetricsConfig,
    ModelConfig,
    ProfilingConfig,
    Recipe,
    TrainingConfig,
)
from titan_growth.growth.chain import Chain, chain_of
from titan_growth.growth.schedule import GrowthPlan, plan_growth
from titan_growth.layout.mesh_shape import resolve_batch, resolve_mesh
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.optimizers.base import check_optimizer
from titan_growth.run.batch_schedule import batch_lines, check_batch_schedule, check_tokens_of_lengths
from titan_growth.run.check_treatments import check_treatments
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.run.phases import Phase, phases_of
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.packages import missing_package
from titan_growth.tools.text import many


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes; by default at its beginning."""

    progress: Progress = field(default_factory=Progress)
    num_growths: int = 0
    """Growths so far."""
    grows_at_once: bool = False
    """The checkpoint was saved at a growth, so the small model is no longer needed."""
    global_batch_size: int | None = None
    """What -1 was resolved to when the run was first started."""


@dataclass(frozen=True)
class RunPlan:
    """What follows from a recipe and the number of ranks."""

    recipe: Recipe
    """With `training.global_batch_size` resolved, as it holds at the start of the run."""
    target: DecoderConfig
    growth_plan: GrowthPlan
    phases: list[Phase]
    """One more than there are growths."""
    first_phase: int
    """The phase that this start of the run begins in."""
    schedule: LRSchedule

    @property
    def seed(self) -> int:
        """The seed of the run."""
        assert self.recipe.debug.seed is not None, "the seed has not been decided"
        return self.recipe.debug.seed

    @property
    def base_seq_len(self) -> int:
        """The sequence length that the data cursor counts in."""
        return self.recipe.training.seq_len

    @property
    def phase(self) -> Phase:
        """The phase that this start of the run begins in."""
        return self.phases[self.first_phase]

    def describe(self, device_type: str) -> list[str]:
        """The plan in a few lines, for the log; `plan_report` has the long version."""
        phase, training = self.phase, self.phase.recipe.training
        steps = phase.num_accumulation_steps
        return [
            f"model {self.recipe.model.name} {self.recipe.model.flavor}: {self.target.num_layers} layers, "
            f"{self.target.num_params:,} parameters in the end",
            f"mesh: {phase.mesh_shape}; batch: {training.global_batch_size} sequences of {training.seq_len} tokens "
            f"({steps} accumulation step{'s' if steps > 1 else ''})",
            *batch_lines(self.recipe.training),
            *stage_lines(phase, device_type),
            *self.growth_lines(),
        ]

    def growth_lines(self) -> list[str]:
        """One line for each growth."""
        growths = self.growth_plan
        return [
            f"growth at {_point(planned, point)}: {planned.operator}{f' x{planned.factor}' if planned.factor else ''}, "
            f"{f'{change}, ' if (change := _change(growth_map.before, growth_map.after)) else ''}"
            f"moments {planned.optimizer_state}, learning rate {planned.lr_policy}{_layout(planned, phase)}"
            for planned, point, growth_map, phase in zip(
                growths.planned, growths.points, growths.chain.maps, self.phases[1:], strict=True
            )
        ]


def stage_lines(phase: Phase, device_type: str) -> list[str]:
    """The stages of a phase in the order of their application, and what each does."""
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
        changes.append(many(planned.num_ranks, "rank"))
    if planned.global_batch_size is not None or planned.seq_len is not None:
        changes.append(f"batch {training.global_batch_size} x {training.seq_len} tokens")
    return "".join(f", {change}" for change in changes)


def _change(before: DecoderConfig, after: DecoderConfig) -> str:
    """`3 -> 12 layers`, `dim 64 -> 128, n_heads 2 -> 4`, `rope_theta 10000 -> 500000`; empty if nothing changes."""
    old, new = before.sizes, after.sizes
    changed = [key for key in new if new[key] != old[key]]
    named = [f"{key} {old[key]} -> {new[key]}" for key in changed if key != "n_layers"]
    depth = [f"{old['n_layers']} -> {new['n_layers']} layers"] if "n_layers" in changed else []
    theta = f"rope_theta {before.rope_theta:g} -> {after.rope_theta:g}"
    return ", ".join([*depth, *named, *([theta] if before.rope_theta != after.rope_theta else [])])


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
        resume: where the run resumes; None at its first start.
        elsewhere: the run is to happen on another machine, so what this one lacks is only warned about.
    """
    own = Findings()
    target = model_config_of(recipe.model, own)
    if target is not None:
        _check_lengths(recipe.training, recipe.growth, recipe.validation.seq_len, target, own)
        check_optimizer(recipe.optimizer, own)
        check_treatments(recipe.optimizer, recipe.model.name, target, own)
    chain = chain_of(recipe.growth, target, own)
    steps, lr = recipe.training.steps, recipe.optimizer.lr
    schedule = LRSchedule(recipe.lr_scheduler, lr=lr, steps=steps, growth=recipe.growth)
    held_out = recipe.data.validation_fraction > 0 or recipe.validation.dataset_path is not None
    _warn_of_growths(recipe.growth, recipe.training.seq_len, recipe.data, own, held_out=held_out)
    if device_type != "cuda":
        _check_cpu(recipe.profiling, recipe.checkpoint, own)
    _check_packages(recipe.metrics, recipe.model, own.warnings if elsewhere else own.problems)
    plan = None
    if chain is not None:
        at = resume or ResumePoint()
        plan = _lay_out(recipe, chain, schedule, own, num_ranks=num_ranks, device_type=device_type, at=at)
    elif shape := resolve_mesh(recipe.parallelism, num_ranks, own):  # mesh and batch can be wrong without a model too
        resolve_batch(recipe.training.global_batch_size, recipe.training.local_batch_size, shape, own)
    found.extend(own)
    return None if own.problems else plan


def _lay_out(
    recipe: Recipe,
    chain: Chain,
    schedule: LRSchedule,
    found: Findings,
    *,
    num_ranks: int,
    device_type: str,
    at: ResumePoint,
) -> RunPlan:
    """The plan of a run whose models are known."""
    candidates = [at.num_growths]
    due = recipe.growth.active_stages[at.num_growths :] if at.grows_at_once else []
    # A growth that needs other ranks is not carried out now: the run asks for them from the phase that it is still in.
    if due and due[0].num_ranks in (None, num_ranks):
        candidates.insert(0, at.num_growths + 1)
    for first_phase in candidates:
        own = Findings()
        phases = phases_of(
            recipe,
            chain,
            own,
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
            paces=[phase.pace for phase in phases],
            progress=at.progress,
            num_growths=at.num_growths,
        )
        if first_phase == at.num_growths or growth_plan.reached(at.num_growths, at.progress):
            break  # otherwise the recipe has moved the growth to a later point
    if recipe.comm.mode == "default" and not own.problems:
        own.extend(timing)
    check_batch_schedule(phases, growth_plan, own, first_phase=first_phase, step=at.progress.step)
    check_tokens_of_lengths([*recipe.lr_scheduler.in_tokens, *recipe.growth.in_tokens], growth_plan, own)
    schedule = schedule.measured_in(
        BatchSizes.measure_of(phases[0].recipe.training, recipe.lr_scheduler, recipe.growth)
    )
    if not own.problems:
        schedule.warn_of_lengths(own)
    found.extend(own)
    return RunPlan(phases[0].recipe, chain.target, growth_plan, phases, first_phase, schedule)


def _check_lengths(
    training: TrainingConfig,
    growth: GrowthConfig,
    validation_seq_len: int | None,
    target: DecoderConfig,
    found: Findings,
) -> None:
    """No sequence is longer than the model's positions."""
    lengths = {"training.seq_len": training.seq_len, "validation.seq_len": validation_seq_len}
    lengths |= {f"growth.stages.{index}.seq_len": one.seq_len for index, one in enumerate(growth.active_stages)}
    for key, length in lengths.items():
        if length is not None and length > target.max_seq_len:
            hint = "Shorten it, or raise model.max_seq_len"
            found.problem(key, f"{length} is more than model.max_seq_len = {target.max_seq_len}", hint)


def _warn_of_growths(growth: GrowthConfig, seq_len: int, data: DataConfig, found: Findings, *, held_out: bool) -> None:
    """Side effects of a growth that its author may not expect."""
    for index, planned in enumerate(growth.active_stages):
        if planned.seq_len not in (None, seq_len) and data.shuffle:
            message = "within an epoch that is shuffled, some of its text comes twice then and some not at all"
            found.warn(f"growth.stages.{index}.seq_len", message, "Set data.shuffle = false to avoid it")
    if growth.active_stages and growth.watchdog.action != "warn" and not held_out:
        message = "nothing is held out, so the watchdog compares losses of different batches"
        found.warn("growth.watchdog.action", message, "Set data.validation_fraction")


def _check_cpu(profiling: ProfilingConfig, checkpoint: CheckpointConfig, found: Findings) -> None:
    """Settings that need CUDA."""
    if profiling.enable_memory_snapshot:
        message = "memory snapshots exist on CUDA only, and this run is on the CPU"
        found.problem("profiling.enable_memory_snapshot", message, "Set it to false")
    if checkpoint.enable and checkpoint.async_mode == "async_with_pinned_mem":
        message = "page-locked memory needs CUDA, and this run is on the CPU"
        found.problem("checkpoint.async_mode", message, 'Set it to "async"')


def _check_packages(metrics: MetricsConfig, model: ModelConfig, report: list[Problem]) -> None:
    """Packages that the recipe needs and this machine lacks. Those of a corpus show when it is opened."""
    if metrics.enable_wandb and (problem := missing_package("metrics.enable_wandb", "wandb", "set it to false")):
        report.append(problem)
    without = 'take "quantize.linear.float8" out of it'
    if model.uses_float8 and (problem := missing_package("model.converters", "torchao", without)):
        report.append(problem)
