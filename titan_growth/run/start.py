"""How a run starts: one sequence, from (recipe, run folder, number of ranks, device) to what starts.

    load_step, start_fresh -> search -> finished? new? -> what was open is decided -> plan -> changes since then

The preflight resolves a start before anything has started, `titan_growth plan` resolves it to show what would happen,
and the ranks resolve it together: rank 0 looks at files, and its findings are broadcast. Planning is pure, so every
rank makes the same plan of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from titan_growth.checkpoint.folder import StepFolder, open_step, root_of
from titan_growth.checkpoint.history import Progress
from titan_growth.checkpoint.rewind import pending_fresh_start, pending_load_step
from titan_growth.checkpoint.search import find_checkpoint
from titan_growth.config.loader import with_values
from titan_growth.config.schema.recipe import CheckpointConfig, Recipe
from titan_growth.run.data import RunData
from titan_growth.run.fresh import require_fresh
from titan_growth.run.initial import initial_state
from titan_growth.run.inputs import changes_since
from titan_growth.run.plan import ResumePoint, RunPlan, plan_run
from titan_growth.run.precision import Precision, decide_precision
from titan_growth.run.resume import ONLY_WEIGHTS_KEY, as_decided, compare, decided_before, num_growths_of
from titan_growth.run.rotary import KEY as ROPE_KEY
from titan_growth.run.rotary import RopeScaling, decide_rope_scaling
from titan_growth.run.vet import problem_of
from titan_growth.tools.collectives import on_rank0
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import is_remote
from titan_growth.tools.logs import logger
from titan_growth.tools.run_folder import RunFolder
from titan_growth.tools.text import some


@dataclass(frozen=True)
class Site:
    """Where a run is to start."""

    folder: RunFolder
    num_ranks: int
    device_type: str
    elsewhere: bool = False
    """The run is to happen on another machine, so what this one lacks is only warned about."""


@dataclass(frozen=True)
class Finished:
    """A run that has nothing left to do."""

    checkpoint: StepFolder
    changes: tuple[str, ...] = ()
    """A line for each setting that the run was not finished with."""

    @property
    def message(self) -> str:
        """What to say then."""
        changes = [line.partition(": ")[2] for line in self.changes]
        ignored = f" Changed since, without effect: {some(changes)}." if changes else ""
        return (
            f"nothing to do: this run is finished at step {self.checkpoint.step} ({self.checkpoint.path}).{ignored} "
            "Raise training.steps to go on, or name another job.dump_folder"
        )


@dataclass(frozen=True)
class RunStart:
    """What starts: the plan of the run, and the checkpoint it goes on from."""

    plan: RunPlan
    checkpoint: StepFolder | None
    """None for a run that starts from scratch, or from `checkpoint.initial_load_path`."""
    recipe: Recipe
    """As asked for: what it leaves open is decided in `plan.recipe`."""
    site: Site
    load_step: int
    """`checkpoint.load_step` as given, also when the run has gone back to it before."""
    fresh: bool
    """From scratch because `checkpoint.start_fresh` says so: an earlier run is set aside."""
    passed_over: tuple[str, ...]
    """A line for each step folder that was passed over."""
    warnings: tuple[Problem, ...]
    changes: tuple[str, ...]
    """A line for each setting that takes effect and that the checkpoint was not written with."""
    precision: Precision
    """The type of the computation."""
    rope_scaling: RopeScaling
    """What the rotary frequencies are divided by."""

    @property
    def decided(self) -> list[str]:
        """A line for each thing that the recipe leaves open and that nobody would guess."""
        return [str(one) for one in (self.precision, self.rope_scaling) if one.reason]

    def log(self) -> None:
        """Says what is worth a line about this start."""
        for line in self.passed_over:
            logger.warning("%s", line)
        for warning in self.warnings:
            logger.warning("%s", warning)
        for line in self.changes:
            logger.info("%s", line)
        for line in self.decided:
            logger.info("%s", line)

    def back_to(self, checkpoint: StepFolder) -> RunStart:
        """The start of the same run from an earlier checkpoint."""
        return start_from(checkpoint, self.recipe, self.site, self.load_step)


def require_same_data(checkpoint: StepFolder | None, data: RunData) -> None:
    """Warns of what has changed without harm. Raises ConfigError when a checkpoint was trained on other data."""
    if checkpoint is None:
        return
    found = changes_since(checkpoint.manifest.data, data.fingerprints(), checkpoint.path.name)
    for warning in found.warnings:
        logger.warning("%s", warning)
    found.raise_if_any()


ReadsShards = Callable[[StepFolder, Recipe], bool]
"""Whether to read a checkpoint in full before a run goes on from it."""


def always(checkpoint: StepFolder, recipe: Recipe) -> bool:
    """Read every checkpoint in full, as the ranks do."""
    return True


def resolve(recipe: Recipe, site: Site, reads_shards: ReadsShards = always) -> RunStart | Finished:
    """What a recipe comes to in its run folder. Every rank calls it, or a process without a process group.

    A run that is to happen elsewhere may have its checkpoints in a store that is closed to this machine: not asked.

    Raises:
        ConfigError: with every problem of the recipe, or every change that the checkpoint does not allow.
        CheckpointError: when the run has checkpoints, and none, or not the one asked for, can be used.
    """
    section = recipe.checkpoint
    if site.elsewhere and is_remote(section.folder):
        start = start_from(None, recipe, site)
        warning = Problem("checkpoint.folder", f"{section.folder} is not looked into: this is the plan of a new run")
        return replace(start, warnings=(*start.warnings, warning))
    root = root_of(section.folder, site.folder.path)
    if on_rank0(lambda: pending_fresh_start(section, root)):
        return start_from(None, recipe, site, fresh=True)
    recipe = with_values(recipe, {"checkpoint.load_step": on_rank0(lambda: pending_load_step(section, root))})
    try:
        found = find_checkpoint(recipe.checkpoint, root, problem_of, lambda folder: reads_shards(folder, recipe))
        notes = [] if found.checkpoint else on_rank0(lambda: require_fresh(section, site.folder.path, found))
    except CheckpointError as error:
        plan_run(recipe, planning := Findings(), num_ranks=site.num_ranks, device_type=site.device_type)
        if planning.problems:
            raise ConfigError([Problem("", str(error)), *planning.problems]) from None
        raise
    checkpoint = found.checkpoint
    if checkpoint is not None and on_rank0(lambda: is_finished(recipe, checkpoint)):
        return _finished(checkpoint, recipe)
    return start_from(checkpoint, recipe, site, section.load_step, (*found.refused, *found.notes, *notes))


def _finished(checkpoint: StepFolder, recipe: Recipe) -> Finished:
    """A finished run. Raises ConfigError when the recipe is that of another one, as for a run that goes on."""
    refused, changes = on_rank0(lambda: compare(checkpoint, as_decided(checkpoint, recipe)))
    if refused := [problem for problem in refused if problem.key != ONLY_WEIGHTS_KEY]:
        raise ConfigError(refused)
    return Finished(checkpoint, tuple(changes))


def start_from(
    checkpoint: StepFolder | None,
    recipe: Recipe,
    site: Site,
    load_step: int = -1,
    passed_over: tuple[str, ...] = (),
    *,
    fresh: bool = False,
) -> RunStart:
    """The start from a checkpoint that has been chosen, or from scratch.

    Raises:
        ConfigError: as `resolve`.
    """
    decisions = on_rank0(lambda: decide(recipe, site, checkpoint, fresh=fresh))
    decided = {
        "debug.seed": decisions.seed,
        "training.mixed_precision_param": decisions.precision.param,
        ROPE_KEY: decisions.rope_scaling.factor,
    }
    plan = plan_run(
        with_values(recipe, decided),
        found := Findings(),
        num_ranks=site.num_ranks,
        device_type=site.device_type,
        resume=ResumePoint(
            progress=decisions.progress,
            num_growths=decisions.num_growths,
            grows_at_once=checkpoint is not None and checkpoint.manifest.held_out_loss is not None,
            global_batch_size=decisions.global_batch_size,
        ),
        elsewhere=site.elsewhere,
    )
    if plan is None:
        raise ConfigError(found.problems)
    changes: list[str] = []
    if checkpoint is not None:
        refused_changes, changes = on_rank0(lambda: compare(checkpoint, plan.recipe))
        if refused_changes:
            raise ConfigError(refused_changes)
    return RunStart(
        plan=plan,
        checkpoint=checkpoint,
        recipe=recipe,
        site=site,
        load_step=load_step,
        fresh=fresh,
        passed_over=passed_over,
        warnings=tuple(found.warnings),
        changes=tuple(changes),
        precision=decisions.precision,
        rope_scaling=decisions.rope_scaling,
    )


@dataclass(frozen=True)
class Decisions:
    """What the recipe leaves open and the run has decided, now or at an earlier start."""

    seed: int
    precision: Precision
    rope_scaling: RopeScaling
    global_batch_size: int | None
    """What -1 stands for; None when it is still to be derived."""
    num_growths: int = 0
    """Growths behind the checkpoint."""
    progress: Progress = field(default_factory=Progress)
    """Its counters. A run that takes over all state of another's checkpoint begins with that one's."""


def decide(recipe: Recipe, site: Site, checkpoint: StepFolder | None, *, fresh: bool = False) -> Decisions:
    """Seed, batch size, precision, rotary scaling: the recipe's, else those of its earlier start, else new ones.

    Args:
        fresh: an earlier start in the folder was of another run.
    """
    before = None if fresh else decided_before(site.folder.path, checkpoint)
    seed = recipe.debug.seed
    if seed is None and before is not None:
        seed = before.debug.seed
    batch = before.training.global_batch_size if before is not None else -1
    growths = recipe.growth.active_stages
    start = checkpoint or (None if site.elsewhere else _taken_over(recipe.checkpoint, len(growths)))
    lengths = (recipe.training.seq_len, recipe.validation.seq_len, *(growth.seq_len for growth in growths))
    return Decisions(
        seed=secrets.randbelow(2**31) if seed is None else seed,
        precision=decide_precision(recipe.training, site.device_type, before.training if before is not None else None),
        rope_scaling=decide_rope_scaling(
            recipe.model,
            before=before.model if before is not None else None,
            longest_seq_len=max(length for length in lengths if length is not None),
            initial_path=recipe.checkpoint.initial_load_path if recipe.checkpoint.enable else None,
        ),
        global_batch_size=None if batch == -1 else batch,
        num_growths=num_growths_of(start) if start is not None else 0,
        progress=start.manifest.progress if start is not None else Progress(),
    )


def _taken_over(section: CheckpointConfig, num_planned: int) -> StepFolder | None:
    """The checkpoint whose whole state a new run takes over; None when there is none, or it will be refused.

    Args:
        num_planned: growths of the recipe.
    """
    if not section.enable or section.initial_load_path is None or section.initial_load_model_only:
        return None
    try:
        initial = initial_state(section)
        return open_step(initial.path) if len(initial.lineage.events) <= num_planned else None
    except CheckpointError:
        return None


def is_finished(recipe: Recipe, checkpoint: StepFolder) -> bool:
    """Whether a run that would go on from this checkpoint has nothing left to do."""
    if recipe.checkpoint.load_step != -1:
        return False  # the user goes back on purpose
    if checkpoint.step < recipe.training.steps:
        return False
    # A run that ended before one of its growths came is not finished, and says so again.
    return num_growths_of(checkpoint) >= len(recipe.growth.active_stages)
