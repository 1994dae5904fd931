"""The search for the checkpoint a run resumes from, with one standard for preflight and ranks.

Preflight searches alone, before anything has started; the ranks search together and divide the reading. Both take the
newest checkpoint that passes. Only the bytes of large checkpoints, and of those in stores, are left to the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.ledger import LEDGER
from titan_growth.checkpoint.reader import misplaced
from titan_growth.checkpoint.steps import CommittedSteps, committed_steps, step_numbers
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.collectives import gather_objects, on_rank0, place
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError, TitanGrowthError
from titan_growth.tools.location import folder_at
from titan_growth.tools.text import one_line

FROM_SCRATCH = (
    "To start from scratch, name another job.dump_folder, or give --checkpoint.start_fresh true, which keeps what is "
    "there under other names"
)


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    checkpoint: StepFolder | None = None
    """None when the run has no checkpoint."""
    refused: list[str] = field(default_factory=list)
    """One line per newer checkpoint passed over."""
    notes: list[str] = field(default_factory=list)
    """One line per step whose save or removal was interrupted, by the ledger, and one if that was lost."""
    nothing_was_committed: bool = False
    """The run has been here, and its ledger says that it never committed anything."""
    ledger_problem: str = ""
    """Why the ledger cannot be read."""


def find_checkpoint(
    section: CheckpointConfig,
    root: Path,
    vet: Callable[[StepFolder], str | None] = lambda folder: None,
    reads_shards: Callable[[StepFolder], bool] = lambda folder: True,
) -> Found:
    """The newest valid checkpoint, or that of `checkpoint.load_step`.

    Args:
        vet: says what is wrong with a checkpoint, if anything; called on rank 0, before any shard is read.
        reads_shards: whether to read a checkpoint's shards in full. The ranks always do.

    Raises:
        CheckpointError: if the requested one, or every one, cannot be used.
    """
    if not section.enable:
        return Found()
    found = on_rank0(lambda: _committed(root, spare_of(section)))
    refused, notes = list(found.refused), [str(error) for error in found.unfinished]
    wanted = section.load_step
    for folder in found.usable:
        if wanted not in (-1, folder.step):
            continue
        damage = on_rank0(functools.partial(vet, folder))
        if damage is None and reads_shards(folder):
            damage = damage_of(folder)
        if damage is None:
            if found.ledger is None:
                why = found.ledger_problem or f"there is no {LEDGER}"
                notes.append(f"{why}: it is written anew from the checkpoints that have a manifest")
            return Found(folder, [str(error) for error in refused] if wanted == -1 else [], notes)
        refused.append(folder.refused(damage))
    if wanted != -1:
        raise CheckpointError(f"checkpoint.load_step: {_no_such_step(root, wanted, [*refused, *found.unfinished])}")
    if refused:
        raise CheckpointError(
            f"{root} holds checkpoints, but none can be used: {'; '.join(map(str, refused))}. "
            f"Restore one. {FROM_SCRATCH}"
        )
    return Found(None, [], notes, found.nothing_was_committed, found.ledger_problem)


def spare_of(section: CheckpointConfig) -> Path | None:
    """What the run starts from: it may lie among its own step folders, and be another program's."""
    return folder_at(section.initial_load_path) if section.initial_load_path is not None else None


def _committed(root: Path, spare: Path | None) -> CommittedSteps:
    try:
        return committed_steps(root, spare)
    except (TitanGrowthError, OSError):
        raise
    except Exception as error:  # packages of stores have errors of their own
        reason = one_line(str(error), 200) or type(error).__name__
        raise CheckpointError(f"checkpoint.folder {root}: cannot be read ({reason})") from error


def damage_of(folder: StepFolder) -> str | None:
    """What is wrong with a checkpoint's files, or None. The ranks divide the reading.

    Checksums only catch accidents; an attacker's match. So every piece listed in the metadata is checked too.
    """
    share = place()
    damage = folder.damage(checksums=True, share=share) or misplaced(folder.path, share)
    return next((found for found in gather_objects(damage) if found), None)


def _no_such_step(root: Path, step: int, refused: Sequence[RefusedCheckpointError]) -> str:
    """The message for a `checkpoint.load_step` that cannot be loaded."""
    why = next((str(error) for error in refused if error.folder == f"step-{step}"), "")
    there = ", ".join(f"step-{found}" for found in step_numbers(root)) or "no checkpoint"
    return f"there is no usable step-{step} in {root}{f' ({why})' if why else ''}; it holds {there}"
