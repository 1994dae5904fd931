"""A model to be grown or written: a step folder of ours, or a Hugging Face folder as if it were one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.commands.args import Source, open_source
from titan_growth.config.loader import with_values
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import chain_of
from titan_growth.interchange.folder import HuggingFaceFolder, is_hugging_face
from titan_growth.interchange.reader import HuggingFaceReader


class _NeverRun(StepFolder):
    """What stands for a step folder where there is none: nothing has been trained here."""

    def lineage(self) -> Lineage:
        return Lineage()


@dataclass(frozen=True)
class HuggingFaceSource(Source):
    """A Hugging Face folder."""

    opened: HuggingFaceReader

    def reader(self) -> SafeReader:
        return self.opened


def open_any(path: Path, plugins: Sequence[str] = ()) -> Source:
    """A folder of either kind, told by its files and checked in full.

    Raises:
        ConfigError: as `open_source`.
        CheckpointError: when it cannot be used.
    """
    return open_hugging_face(path) if path.is_dir() and is_hugging_face(path) else open_source(path, plugins)


def open_hugging_face(path: Path) -> HuggingFaceSource:
    """A Hugging Face folder. Raises CheckpointError when it is refused."""
    reader = HuggingFaceReader(path)
    recipe = recipe_of(reader.opened)
    chain, problems = chain_of(recipe.growth, reader.opened.config)
    assert chain is not None, f"a recipe without growths has no chain: {problems}"
    return HuggingFaceSource(_NeverRun(path, new_manifest(reader.opened)), recipe, chain, Lineage(), reader)


def new_manifest(opened: HuggingFaceFolder) -> Manifest:
    """The manifest of a step folder with these weights, without its files."""
    return Manifest(
        progress=Progress(),
        num_layers=opened.config.num_layers,
        num_ranks=1,
        mesh="imported from Hugging Face",
        model_only=True,
        permanent=False,
        metrics_offset=0,
    )


def recipe_of(opened: HuggingFaceFolder) -> Recipe:
    """The recipe of a run of this model: its sizes and its tokenizer; all else is as by default."""
    types = {tensor.dtype for tensor in opened.tensors.values()}
    base = Recipe()
    has_tokenizer = any((opened.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    values = {
        "model": opened.section.model_dump(),
        "training.dtype": "bfloat16" if types == {torch.bfloat16} else "float32",
        "training.seq_len": min(base.training.seq_len, opened.config.max_seq_len),
    }
    recipe = with_values(base, values)
    return with_values(recipe, {"model.hf_assets_path": str(opened.path.resolve())}) if has_tokenizer else recipe


def whole_tensor(reader: SafeReader, chunks: Sequence[StoredChunk], shape: tuple[int, ...]) -> Tensor:
    """A stored tensor, put together from its pieces."""
    if len(chunks) == 1:
        return reader.read_chunk(chunks[0])
    whole = torch.empty(shape, dtype=chunks[0].dtype)
    buffer = torch.empty(max(chunk.num_bytes for chunk in chunks), dtype=torch.uint8)
    for chunk in chunks:
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = reader.read_chunk(chunk, buffer)
    return whole
