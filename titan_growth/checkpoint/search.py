"""The checkpoint that a run goes on from: one search, with one standard.

The preflight searches alone, before anything has started. The ranks search together and divide the reading. Both take
the newest checkpoint that passes, so the preflight promises what the ranks will take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titan_growth.checkpoint.folder import StepFolder, committed_steps, step_numbers
from titan_growth.checkpoint.reader import misplaced
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.collectives import gather_objects, on_rank0, place
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError

Vet = Callable[[StepFolder], str | None]
"""What is wrong with a checkpoint, or None."""


def passes(folder: StepFolder) -> str | None:
    """The `Vet` that finds nothing wrong."""
    return None


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    checkpoint: StepFolder | None = None
    """None when the run has no checkpoint."""
    refused: list[str] = field(default_factory=list)
    """A line for each newer checkpoint that was passed over."""


def find_checkpoint(
    section: CheckpointConfig,
    root: Path,
    vet: Vet = passes,
    reads_shards: Callable[[StepFolder], bool] = lambda folder: True,
) -> Found:
    """The newest good checkpoint, or that of `checkpoint.load_step`.

    Args:
        vet: asked on rank 0, before any shard is read.
        reads_shards: whether to read the shards of a checkpoint in full. The ranks always do.

    Raises:
        CheckpointError: when the one asked for, or every one there is, cannot be used.
    """
    if not section.enable:
        return Found()
    found = on_rank0(lambda: committed_steps(root))
    refused = list(found.refused)
    wanted = section.load_step
    for folder in found.usable:
        if wanted not in (-1, folder.step):
            continue
        damage = on_rank0(functools.partial(vet, folder))
        if damage is None and reads_shards(folder):
            damage = damage_of(folder)
        if damage is None:
            return Found(folder, [str(error) for error in refused] if wanted == -1 else [])
        refused.append(folder.refused(damage))
    if wanted != -1:
        raise CheckpointError(f"checkpoint.load_step: {_no_such_step(root, wanted, refused)}")
    if refused:
        raise CheckpointError(_none_usable(root, refused))
    return Found()


def damage_of(folder: StepFolder) -> str | None:
    """What is wrong with the files of a checkpoint, or None. The ranks divide the reading.

    Checksums alone show accidents: an attacker's checksums fit. So every piece that the metadata names is checked too.
    """
    share = place()
    damage = folder.damage(checksums=True, share=share) or misplaced(folder.path, share)
    return next((found for found in gather_objects(damage) if found), None)


def _no_such_step(root: Path, step: int, refused: Sequence[RefusedCheckpointError]) -> str:
    """The message for a `checkpoint.load_step` that cannot be had."""
    why = next((str(error) for error in refused if error.folder == f"step-{step}"), "")
    there = ", ".join(f"step-{found}" for found in step_numbers(root)) or "no checkpoint"
    return f"there is no usable step-{step} in {root}{f' ({why})' if why else ''}; it holds {there}"


def _none_usable(root: Path, refused: Sequence[RefusedCheckpointError]) -> str:
    """The message for a run whose checkpoints are all damaged."""
    return (
        f"{root} holds checkpoints, but none can be used: {'; '.join(map(str, refused))}. "
        "Restore one, or name another job.dump_folder to start from scratch"
    )
