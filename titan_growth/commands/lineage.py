"""`python -m titan_growth lineage CHECKPOINT`: the growths behind a checkpoint, oldest first."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from titan_growth.checkpoint.folder import StepFolder, open_step
from titan_growth.checkpoint.history import GrowthEvent, RollBack
from titan_growth.commands.args import CommandLine
from titan_growth.commands.described import described, is_foreign
from titan_growth.tools.errors import CheckpointError, TitanGrowthError
from titan_growth.tools.location import folder_at
from titan_growth.tools.text import many, one_line, sources

_LINE = CommandLine(
    "lineage",
    "Prints the growths behind a checkpoint: when, by which operator, from which checkpoint and on which mesh.",
    example="outputs/checkpoint/step-5000",
    statuses="0 printed, 1 no such checkpoint, 2 wrong arguments",
)
_LINE.words("STEP_FOLDER", "A committed step folder.", dest="folder", many=False)


@_LINE.command
def main(args: Namespace) -> int:
    """Prints the lineage of a step folder; returns 0, or 1 when there is none."""
    try:
        print("\n".join(lineage_lines(folder_at(args.folder))))
    except TitanGrowthError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def lineage_lines(path: Path) -> Iterator[str]:
    """The lines of the report. Raises CheckpointError when there is no checkpoint, or its lineage cannot be read."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Name a step-N folder")
    if is_foreign(path):
        yield f"{path}: written by another program, such as torchtitan: no growths and no counters are known"
        return
    folder = open_step(path)
    if folder is None:
        raise CheckpointError(f"{path}: is no committed checkpoint: {described(path)}")
    lineage = folder.lineage()
    for event in lineage.ancestors:
        yield from _event(event, "before this run, ")
    for parent in lineage.parents:
        yield f"goes on from {one_line(parent)}"
    for number, growth in enumerate([*lineage.events, None]):
        for roll_back in lineage.roll_backs:
            if min(roll_back.growth, len(lineage.events)) == number:
                yield _roll_back(roll_back)
        if growth is not None:
            yield from _event(growth, "")
    yield from _now(folder)
    if lineage.averaged:
        yield f"    weights: the mean of {', '.join(one_line(name) for name in lineage.averaged)}"


def _event(event: GrowthEvent, prefix: str) -> Iterator[str]:
    changed = [key for key in event.to_sizes if event.to_sizes[key] != event.from_sizes.get(key)]
    sizes = ", ".join(f"{key} {event.from_sizes.get(key)} -> {event.to_sizes[key]}" for key in changed)
    yield f"{prefix}step {event.step:,}: {event.operator}, {sizes or 'no change of size'}"
    yield f"    {event.tokens:,} tokens, {event.flops:.4e} FLOPs until then; read from {event.source}"
    yield f"    layers from {sources(event.layer_map)}"
    losses = ""
    if event.loss_before is not None and event.loss_after is not None:
        losses = f"; held-out loss {event.loss_before:.4f} -> {event.loss_after:.4f}"
    took = "" if event.seconds is None else f" in {event.seconds:.1f} s"
    where = _made(event.mesh, "on ", f" ({many(event.num_ranks, 'rank')})")
    yield f"    {where}, {event.bytes_read:,} bytes read{took}{losses}"


def _made(mesh: str, on: str, ranks: str = "") -> str:
    """`written on 2 x fsdp`, or what a command has done instead of ranks: `averaged on disk`."""
    return mesh if mesh.endswith(" on disk") else f"{on}{mesh}{ranks}"


def _roll_back(roll_back: RollBack) -> str:
    return (
        f"step {roll_back.noticed_at:,}: growth of step {roll_back.step:,} taken back, held-out loss "
        f"{roll_back.loss_then:.4f} against {roll_back.loss_before:.4f} before it; not again before step "
        f"{roll_back.postponed_to:,}"
    )


def _now(folder: StepFolder) -> Iterator[str]:
    manifest = folder.manifest
    progress = manifest.progress
    yield (
        f"step {progress.step:,}: {manifest.num_layers} layers, {progress.tokens:,} tokens, "
        f"{progress.flops:.4e} FLOPs, {_made(manifest.mesh, 'written on ')}"
    )
