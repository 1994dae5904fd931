"""`python -m titan_growth verify FOLDER ...`: is a checkpoint complete, and what does it hold?

Reads everything: sizes and SHA-256 sums of all files, metadata, recipe and lineage, and the chunks, which must tile
every tensor of the model.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.steps import step_numbers, step_path
from titan_growth.commands.args import CommandLine
from titan_growth.commands.described import is_foreign
from titan_growth.commands.foreign import foreign_lines
from titan_growth.commands.source import committed
from titan_growth.config.plugins import load_plugins
from titan_growth.models.roles import OPTIMIZER_PREFIX, prefix_of_shadow, shadow_kinds
from titan_growth.run.vet import problem_of, whole_problem
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, TitanGrowthError, print_error
from titan_growth.tools.location import folder_at
from titan_growth.tools.text import gib, many, one_line

_LINE = CommandLine(
    "verify",
    "Checks step folders in full: every file, every tensor. Nothing in a checkpoint is run.",
    example="outputs/checkpoint",
    statuses="0 all are complete, 1 one or more are not, 2 wrong arguments, or a plugin is missing",
)
_LINE.recipe_of_another()
_LINE.plugins()
_LINE.words("FOLDER", "A step folder, or a folder of them to check them all.", dest="folders", many=True)


@_LINE.command
def main(args: Namespace) -> int:
    """Checks the folders; returns the exit status."""
    load_plugins(args.plugins)
    status = num_foreign = 0
    for word in args.folders:
        try:
            path = folder_at(word)
            folders = [step_path(path, step) for step in sorted(step_numbers(path))] or [path]
        except TitanGrowthError as error:
            status = print_error(error)
            continue
        num_foreign += sum(is_foreign(folder) for folder in folders)
        for folder in folders:
            try:
                print("\n".join(verified(folder, args.recipe_file)), flush=True)
            except ConfigError as error:
                status = print_error(error)
            except TitanGrowthError as error:
                place = f" (in {path.parent})" if len(args.folders) > 1 else ""
                print(f"error: {one_line(str(error))}{place}", flush=True)
                status = status or 1
    if args.recipe_file is not None and status == 0 and num_foreign == 0:
        message = "was not looked at: the folders say themselves which model they hold"
        status = print_error(ConfigError([Problem("--recipe", message, "Leave it out")]))
    return status


def verified(path: Path, recipe_file: str | None = None) -> Iterator[str]:
    """What a step folder holds, line by line.

    Args:
        recipe_file: has the model of folders of another program.

    Raises:
        CheckpointError: when it is not whole.
        ConfigError: when its recipe means nothing without plugins that have not been loaded.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if recipe_file is not None and is_foreign(path):
        yield from foreign_lines(path, recipe_file)
        return
    folder = committed(path)
    # In this order: an untrusted file may be absurdly large, and is read only once its size is known to be right.
    if damage := folder.damage(checksums=False) or problem_of(folder) or whole_problem(folder):
        raise folder.refused(damage)
    manifest = folder.manifest
    ranks = many(manifest.num_ranks, "rank")
    yield f"{path}: step {folder.step:,}, {manifest.num_layers} layers, written by {ranks} ({manifest.mesh})"
    yield f"    {len(manifest.files)} files, {gib(folder.num_bytes)}: sizes and checksums are right"
    yield f"    {_tensors(folder)}"
    yield f"    {manifest.progress.tokens:,} tokens, {many(len(folder.lineage().events), 'growth')} behind it"


def _tensors(folder: StepFolder) -> str:
    """Counts the tensors, once every chunk has been read."""
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
    num_shadows = sum(bool(prefix_of_shadow(name)) for name in chunks)
    kinds = "".join(f", with its {kind}," for kind in sorted(shadow_kinds(chunks)))
    num_own = len(chunks) - num_state - num_rng - num_shadows
    return f"{num_own:,} tensors of the model{kinds} {state}, all readable and finite"
