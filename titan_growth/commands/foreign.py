"""The model in a step folder of another program.

torchtitan writes DCP folders like ours, with the same names of tensors, but without a manifest, a recipe or a lineage.
A recipe that has its model in [model] makes up for what it takes to read the weights; moments and counters are left
out, as their meaning is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.loading import misfits
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.steps import is_step_name, step_of
from titan_growth.commands.described import is_foreign
from titan_growth.commands.source import NeverRun, Source, open_any, whole_tensor
from titan_growth.config.loader import inspect_recipe, with_values
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import Chain
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.run.initial import tied_names
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import gib


class ForeignSource(Source):
    """A DCP folder without a manifest, and the model that a recipe says it holds."""

    def reader(self) -> SafeReader:
        return SafeReader(self.folder.path, tied_names(self.config.tied))


def open_with_recipe(path: Path, recipe_file: str | None) -> Source:
    """A folder of any kind, checked in full.

    Args:
        recipe_file: for a folder of another program, and for no other.

    Raises:
        ConfigError: when it is not there, the recipe is wrong, or one is given that would be ignored.
        CheckpointError: when it is refused.
    """
    if recipe_file is None:
        return open_any(path)
    if path.is_dir() and not is_foreign(path):
        message = "would be ignored: the folder says itself which model it holds"
        raise ConfigError([Problem("--recipe", message, "Leave it out")])
    return open_foreign(path, recipe_file)


def open_foreign(path: Path, recipe_file: str) -> ForeignSource:
    """The weights in a step folder of another program.

    Raises:
        ConfigError: when the folder is not there, or the recipe is wrong.
        CheckpointError: when the folder does not hold the recipe's model, whole and readable.
    """
    if not path.is_dir():
        raise ConfigError([Problem("--from", f"{path}: no such folder", "Name a step-N folder")])
    recipe = _recipe(recipe_file)
    config = model_config_of(recipe.model, found := Findings())
    found.raise_if_any()
    assert config is not None, "a model without problems has sizes"
    step = step_of(path.name) if is_step_name(path.name) else 0
    manifest = Manifest(
        progress=Progress(step=step),
        num_layers=config.num_layers,
        num_ranks=1,
        mesh="of another program",
        model_only=True,
        permanent=False,
        metrics_offset=0,
    )
    opened = ForeignSource(NeverRun(path, manifest), recipe, Chain(config, ()), Lineage())
    reader = opened.reader()
    with torch.device("meta"):
        wanted = family_module(recipe.model.name).Decoder(config, 8).state_dict()
    if wrong := misfits(reader, wanted, casts=True):
        raise CheckpointError(f"{wrong[0]}. Give a --recipe with its model in [model]")
    chunks = reader.chunks()
    reader.check_chunks(chunk for name in wanted for chunk in chunks.get(name, ()))
    for copy, original in config.tied.items():
        _require_one_value(SafeReader(path), copy, original)
    return opened


def _require_one_value(stored: SafeReader, copy: str, original: str) -> None:
    """Raises CheckpointError if a tied parameter is stored twice with two values: one would be left out in silence."""
    chunks, entries = stored.chunks(), stored.tensor_entries()
    if copy not in chunks:
        return
    one, other = (whole_tensor(stored, chunks[name], tuple(entries[name].size)) for name in (copy, original))
    if one.dtype != other.dtype or not torch.equal(one, other):
        why = f"{copy} is not {original}, though the recipe has model.tie_word_embeddings = true"
        raise stored.refused(f"{why}. Say false there if the head was trained apart")


def _recipe(recipe_file: str) -> Recipe:
    """A recipe whose [model] is taken as it is, without growths."""
    recipe = inspect_recipe(["--job.config_file", recipe_file], found := Findings())
    found.raise_if_any()
    assert recipe is not None, "a recipe without problems can be made"
    return with_values(recipe, {"growth.stages": [], "growth.base": {}})


def foreign_lines(path: Path, recipe_file: str) -> Iterator[str]:
    """What a step folder of another program holds, once every tensor of its model has been read. Raises as above."""
    opened = open_foreign(path, recipe_file)
    reader, config = opened.reader(), opened.config
    num_bytes = 0
    for name, pieces in SafeReader(path).chunks().items():
        for piece in pieces:
            num_bytes += piece.num_bytes
            for values in reader.values_in_parts(piece):
                if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                    raise opened.folder.refused(f"{name} is not finite")
    yield f"{path}: {config.num_layers} layers, {config.num_params:,} parameters, written by another program"
    yield f"    {gib(num_bytes)} of tensors, all of the recipe's model, readable and finite"
    yield "    no manifest: there are no checksums to compare, and no counters"
