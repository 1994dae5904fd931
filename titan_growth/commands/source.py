"""The model that a command reads: a step folder, or a Hugging Face folder, shown as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_growth.checkpoint.folder import LINEAGE, RECIPE, StepFolder, open_step
from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.commands.described import described
from titan_growth.config.loader import with_values
from titan_growth.config.plugins import require_plugins
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import Chain, chain_of
from titan_growth.interchange.folder import HuggingFaceFolder, is_hugging_face
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.interchange.tokenizer_files import TOKENIZER_JSON, TOKENIZER_MODEL
from titan_growth.models.config import DecoderConfig
from titan_growth.run.vet import history_of, plugins_of, problem_of, whole_problem
from titan_growth.tools.errors import ConfigError, Problem, RefusedCheckpointError
from titan_growth.tools.findings import Findings


@dataclass(frozen=True)
class Source:
    """A model on disk, to be grown or exported: here, a committed checkpoint."""

    folder: StepFolder
    recipe: Recipe
    """What it was written with."""
    chain: Chain
    lineage: Lineage

    @property
    def config(self) -> DecoderConfig:
        """The model that it holds."""
        return self.chain.configs[len(self.lineage.events)]

    def reader(self) -> SafeReader:
        """A reader of its tensors."""
        return SafeReader(self.folder.path)


def committed(path: Path) -> StepFolder:
    """A step folder. Raises CheckpointError when it was never committed."""
    folder = open_step(path)
    if folder is None:
        raise RefusedCheckpointError(str(path), described(path))
    return folder


def open_source(path: Path) -> Source:
    """A step folder, checked in full.

    Raises:
        ConfigError: when it is not there, or its recipe needs plugins that have not been loaded.
        CheckpointError: when it was never committed, is damaged, or cannot be grown from at this step.
    """
    if not path.is_dir():
        raise ConfigError([Problem("--from", f"{path}: no such folder", "Name a step-N folder")])
    folder = committed(path)
    if damage := folder.damage(checksums=True, names=(RECIPE, LINEAGE)):
        raise folder.refused(damage)
    require_plugins(plugins_of(folder), str(path))
    if damage := problem_of(folder) or whole_problem(folder):
        raise folder.refused(damage)
    history = history_of(folder)
    if history.lineage.events:
        last = history.lineage.events[-1]
        mask_steps = last.stage.get("mask_steps")
        if folder.step < last.step + (mask_steps if isinstance(mask_steps, int) else 0):
            raise folder.refused("the mask of its last growth is still opening. Take a later step")
    return Source(folder, *history)


class NeverRun(StepFolder):
    """Stands in for a step folder: weights that no run has written."""

    def lineage(self) -> Lineage:
        return Lineage()


@dataclass(frozen=True)
class HuggingFaceSource(Source):
    """A Hugging Face folder."""

    stored: HuggingFaceReader

    def reader(self) -> SafeReader:
        return self.stored


def open_any(path: Path) -> Source:
    """A folder of either kind, checked in full. Raises as `open_source` does."""
    return open_hugging_face(path) if path.is_dir() and is_hugging_face(path) else open_source(path)


def open_hugging_face(path: Path) -> HuggingFaceSource:
    """A Hugging Face folder. Raises CheckpointError when it is refused."""
    reader = HuggingFaceReader(path)
    recipe = recipe_for(reader.opened)
    chain = chain_of(recipe.growth, reader.opened.config, found := Findings())
    assert chain is not None, f"a recipe without growths has no chain: {found.problems}"
    return HuggingFaceSource(NeverRun(path, new_manifest(reader.opened)), recipe, chain, Lineage(), reader)


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


def recipe_for(opened: HuggingFaceFolder) -> Recipe:
    """The recipe of a run with this model: its sizes and tokenizer, and the defaults of all other keys."""
    types = {tensor.dtype for tensor in opened.tensors.values()}
    base = Recipe()
    values: dict[str, Any] = {
        "model": opened.section.model_dump(),
        "training.dtype": "bfloat16" if types == {torch.bfloat16} else "float32",
        "training.seq_len": min(base.training.seq_len, opened.config.max_seq_len),
    }
    if any((opened.path / name).is_file() for name in (TOKENIZER_JSON, TOKENIZER_MODEL)):
        values["model.hf_assets_path"] = str(opened.path.resolve())
    return with_values(base, values)


def whole_tensor(reader: SafeReader, chunks: Sequence[StoredChunk], shape: tuple[int, ...]) -> Tensor:
    """Assembles a stored tensor from its chunks."""
    if len(chunks) == 1:
        return reader.read_chunk(chunks[0])
    whole = torch.empty(shape, dtype=chunks[0].dtype)
    buffer = torch.empty(max(chunk.num_bytes for chunk in chunks), dtype=torch.uint8)
    for chunk in chunks:
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = reader.read_chunk(chunk, buffer)
    return whole
