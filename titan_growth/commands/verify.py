"""`python -m titan_growth verify FOLDER ...`: is a checkpoint whole, and what does it hold?

Reads everything: sizes and SHA-256 sums of all files, the metadata (nothing in it is run), whether the stored pieces of
every tensor make it up and can be read, whether recipe and lineage can, and whether all weights of the model are there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from titan_growth.checkpoint.folder import StepFolder, open_step, step_numbers, step_path
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.growth.rules import OPTIMIZER_PREFIX
from titan_growth.run.vet import problem_of, whole_problem
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError, TitanGrowthError, one_line, print_error
from titan_growth.tools.location import folder_at
from titan_growth.tools.run_folder import gib

USAGE = """usage: python -m titan_growth verify FOLDER [FOLDER ...]

Checks step folders in full; a folder of step folders stands for all of them. Nothing in a checkpoint is run.

Exit status: 0 all are whole, 1 one or more are not, 2 wrong arguments.
"""


def main(argv: list[str]) -> int:
    """Checks the folders; returns the exit status."""
    if not argv or any(word.startswith("-") for word in argv):
        asked = bool(argv) and argv[0] in ("--help", "-h")
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    status = 0
    for word in argv:
        try:
            path = folder_at(word)
            folders = [step_path(path, step) for step in sorted(step_numbers(path))] or [path]
        except TitanGrowthError as error:
            status = print_error(error)
            continue
        for folder in folders:
            try:
                print("\n".join(verified(folder)), flush=True)
            except TitanGrowthError as error:
                place = f" (in {path.parent})" if len(argv) > 1 else ""
                print(f"error: {one_line(str(error))}{place}", flush=True)
                status = status or 1
    return status


def verified(path: Path) -> Iterator[str]:
    """What a step folder holds, line by line.

    Raises:
        CheckpointError: when it is not whole.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    folder = open_step(path)
    if folder is None:
        raise RefusedCheckpointError(str(path), "it has no manifest, so it was never committed")
    # In this order: what a stranger may have made absurdly large is read once it is known to be what it should.
    if damage := folder.damage(checksums=False) or problem_of(folder) or whole_problem(folder):
        raise folder.refused(damage)
    manifest = folder.manifest
    num_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    ranks = f"{manifest.num_ranks} rank{'s' if manifest.num_ranks != 1 else ''}"
    yield f"{path}: step {folder.step:,}, {manifest.num_layers} layers, written by {ranks} ({manifest.mesh})"
    yield f"    {len(manifest.files)} files, {gib(num_bytes)}: sizes and checksums are right"
    yield f"    {_tensors(folder)}"
    growths = len(folder.lineage().events)
    yield f"    {manifest.progress.tokens:,} tokens, {growths} growth{'s' if growths != 1 else ''} behind it"


def _tensors(folder: StepFolder) -> str:
    """What the tensors are, once each of their pieces has been read."""
    reader = SafeReader(folder.path)
    chunks = reader.chunks()
    for name, pieces in chunks.items():
        for piece in pieces:
            for values in reader.values_in_parts(piece):
                if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                    raise folder.refused(f"{name} is not finite")
    num_rng = sum(name.startswith("rng.") for name in chunks)
    num_state = sum(name.startswith(OPTIMIZER_PREFIX) for name in chunks)
    state = f"and {num_state:,} of the optimizer" if num_state else "and no optimizer state"
    return f"{len(chunks) - num_state - num_rng:,} tensors of the model {state}, all readable and finite"
