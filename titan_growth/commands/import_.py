"""`python -m titan_growth import`: a Hugging Face folder becomes a step folder.

The result is a checkpoint with weights only, for `checkpoint.initial_load_path`, `grow` and `verify`. Weights keep
their type and, but for the order of the rows of wq and wk, their bytes. config.json and tokenizer files come along.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from titan_growth.checkpoint.folder import file_entry
from titan_growth.checkpoint.history import Lineage
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.commands.args import CommandLine
from titan_growth.commands.source import new_manifest, open_hugging_face, whole_tensor
from titan_growth.commands.target import FileEntries, commit, new_folder, require_new, save_tensors
from titan_growth.config.loader import with_values
from titan_growth.interchange.folder import CONFIG, is_hugging_face
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.interchange.tokenizer_files import ASSETS, checked_assets, copy_assets
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, RefusedCheckpointError
from titan_growth.tools.text import gib

_LINE = CommandLine(
    "import",
    """Makes a step folder (weights only) of a Hugging Face folder: config.json, safetensors in one file or many,
    tokenizer files. Llama and Qwen3 (dense). Nothing in the folder is run, and pickled weights are not read.""",
    example="--from Llama-3.2-1B --to imported/step-0",
    statuses="0 written and verified, 1 failed, 2 wrong arguments",
)
_LINE.source_and_target("A Hugging Face folder on this machine.", "The step folder to write.")


@_LINE.command
def main(args: Namespace) -> int:
    """Writes the folder; returns the exit status."""
    print(import_folder(Path(args.source), Path(args.target)))
    return 0


def import_folder(source: Path, target: Path) -> str:
    """Writes a step folder; returns one line about it.

    Raises:
        ConfigError: when the source is not there, or the target in the way.
        CheckpointError: when the source is refused or the target cannot be written. Nothing is committed then.
    """
    if not source.is_dir():
        raise ConfigError([Problem("--from", f"{source}: no such folder", "Name a Hugging Face folder")])
    if (source / ".metadata").exists():
        raise ConfigError([Problem("--from", f"{source} is a step folder already", "Name a Hugging Face folder")])
    if not is_hugging_face(source):
        raise RefusedCheckpointError(source.name, f"it has no {CONFIG}")
    model = open_hugging_face(source)
    require_new(target, source)
    assets = checked_assets(source, [CONFIG, *ASSETS])
    folder, recipe, config = model.stored.opened, model.recipe, model.config
    tokenizer = "it has no tokenizer"
    if recipe.model.hf_assets_path is not None:
        recipe = with_values(recipe, {"model.hf_assets_path": str(target.resolve())})
        tokenizer = "tokenizer files beside it"
    with new_folder(target, folder.num_bytes, "the model"):
        files = _write(model.stored, target)
        copy_assets(assets, target)
        files |= {name: file_entry(target / name) for name in assets}
        commit(target, recipe, Lineage(), new_manifest(folder), files)
    return (
        f"{target}: {config.num_layers} layers of width {config.dim}, {config.num_params:,} parameters, "
        f"{gib(folder.num_bytes)} written and verified; {tokenizer}"
    )


def _write(reader: HuggingFaceReader, target: Path) -> FileEntries:
    """Writes one tensor at a time, then reads each back and compares it."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in reader.opened.tensors.items()
    }
    entries = save_tensors(
        tensors, target, lambda name: whole_tensor(reader, reader.chunks()[name], tensors[name].shape)
    )
    written = SafeReader(target)
    chunks = written.chunks()
    for name in tensors:
        (chunk,) = chunks[name]
        here = written.read_chunk(chunk)
        pieces = reader.chunks()[name]
        buffer = torch.empty(max(piece.num_bytes for piece in pieces), dtype=torch.uint8)
        for piece in pieces:
            there = reader.read_chunk(piece, buffer)
            if not torch.equal(there.view(torch.uint8), here.narrow(0, piece.offsets[0], len(there)).view(torch.uint8)):
                raise CheckpointError(f"{target}: {name} is not what was read. Nothing was committed")
    return entries
