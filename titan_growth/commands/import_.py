"""`python -m titan_growth import`: a Hugging Face folder becomes a step folder.

The result is a checkpoint with weights only: a run starts from it (`checkpoint.initial_load_path`), `grow`
grows it, `verify` reads it. Weights keep their type and, but for the order of the rows of wq and wk, their bytes.
Its config.json and tokenizer files lie in the step folder, under its checksums; the recipe's `model.hf_assets_path`
names that folder.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from titan_growth.checkpoint.folder import LINEAGE, RECIPE, file_entry, write_manifest
from titan_growth.checkpoint.history import Lineage
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.writer import ShardWriter
from titan_growth.commands.args import CommandLine
from titan_growth.commands.source import HuggingFaceSource, new_manifest, open_hugging_face, whole_tensor
from titan_growth.commands.target import emptied, failure, require_new, require_space
from titan_growth.config.loader import to_toml, with_values
from titan_growth.interchange.folder import CONFIG, is_hugging_face
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.interchange.tokenizer_files import assets_in, checked_assets, copy_assets
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, RefusedCheckpointError, TitanGrowthError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.text import gib


def command_line() -> CommandLine:
    """The arguments of `import`."""
    line = CommandLine(
        "import",
        """Makes a step folder (weights only) of a Hugging Face folder: config.json, safetensors in one file or many,
        tokenizer files. Llama and Qwen3 (dense). Nothing in the folder is run, and pickled weights are not read.""",
        example="--from Llama-3.2-1B --to imported/step-0",
        statuses="0 written and verified, 1 failed, 2 wrong arguments",
    )
    line.source_and_target("A Hugging Face folder on this machine.", "The step folder to write.")
    return line


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return command_line().run(argv or ["--help"], _import)


def _import(args: Namespace) -> int:
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
    opened = open_hugging_face(source)
    require_new(target, source)
    assets = checked_assets(source, [CONFIG, *assets_in(source)])
    num_bytes = opened.opened.opened.num_bytes
    try:
        require_space(target, num_bytes, "the model")
        entries = _write(opened.opened, target)
        tokenizer = _commit(opened, target, assets, entries)
    except (OSError, CheckpointException, TitanGrowthError) as error:
        emptied(target)
        raise failure(target, error) from error
    config = opened.config
    return (
        f"{target}: {config.num_layers} layers of width {config.dim}, {config.num_params:,} parameters, "
        f"{gib(num_bytes)} written and verified; {tokenizer}"
    )


FileEntries = dict[str, dict[str, Any]]


class _Planner(DefaultSavePlanner):
    """A DCP save plan whose tensors are read when they are written."""

    def __init__(self, reader: HuggingFaceReader) -> None:
        super().__init__()
        self.reader = reader

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn
        return whole_tensor(self.reader, self.reader.chunks()[name], self.reader.opened.tensors[name].shape)


def _write(reader: HuggingFaceReader, target: Path) -> FileEntries:
    """Writes one tensor after another, compares what has been written with what is there; entries of the manifest."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in reader.opened.tensors.items()
    }
    writer = ShardWriter(target)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=writer, planner=_Planner(reader), no_dist=True)
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
    return writer.entries


def _commit(source: HuggingFaceSource, target: Path, assets: dict[str, Path], entries: FileEntries) -> str:
    """Writes recipe, lineage, tokenizer files and manifest; returns what became of the tokenizer, in words."""
    copy_assets(assets, target)
    recipe = source.recipe
    tokenizer = "it has no tokenizer"
    if recipe.model.hf_assets_path is not None:
        recipe = with_values(recipe, {"model.hf_assets_path": str(target.resolve())})
        tokenizer = "tokenizer files beside it"
    write_atomic(target / RECIPE, to_toml(recipe))
    write_atomic(target / LINEAGE, Lineage().to_json())
    manifest = new_manifest(source.opened.opened)
    manifest.files.update({name: file_entry(target / name) for name in (*assets, RECIPE, LINEAGE)})
    manifest.files.update(entries)
    write_manifest(target, manifest)
    return tokenizer
