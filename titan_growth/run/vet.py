"""Can a run resume from this checkpoint? Decided before anything is built; the checkpoint may be hostile.

Matching checksums prove nothing: who forges files forges checksums too. So the contents are checked: recipe, lineage
and manifest must agree, and the metadata must list the tensors of their model. Each answer is one line; after a refusal
the run takes the next older checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from titan_growth.checkpoint.folder import LINEAGE, METADATA, RECIPE, StepFolder
from titan_growth.checkpoint.history import Lineage
from titan_growth.checkpoint.untrusted.json_types import first_problem
from titan_growth.config.loader import recipe_from_toml
from titan_growth.config.plugins import PLUGINS_KEY, require_plugins
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.chain import Chain, chain_of
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.tools.errors import CheckpointError
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import one_line

LARGEST = 1 << 24
"""Bound on the sizes in a stored recipe: loops run over them."""
SPARE_BYTES = 1 << 20
"""Bytes of a shard that may belong to no tensor."""


class History(NamedTuple):
    """Where a checkpoint comes from."""

    recipe: Recipe
    """What it was written with."""
    chain: Chain
    """The models of that recipe."""
    lineage: Lineage

    @property
    def config(self) -> DecoderConfig:
        """The model that the checkpoint holds."""
        return self.chain.configs[len(self.lineage.events)]


def history_of(folder: StepFolder) -> History:
    """The history of a checkpoint.

    Raises:
        CheckpointError: when a part cannot be read, or contradicts another or the manifest.
        ConfigError: when its recipe makes no model, and names plugins that have not been loaded.
    """
    lineage = folder.lineage()
    recipe = recipe_of(folder)
    if too_large := next(_too_large(recipe.model_dump(include={"model", "growth"})), None):
        raise folder.refused(f"its recipe cannot be used ({too_large})")
    try:
        found = Findings()
        chain = chain_of(recipe.growth, model_config_of(recipe.model, found), found)
    except (ArithmeticError, ValueError, TypeError, KeyError, IndexError) as error:  # absurd sizes
        raise folder.refused(f"its recipe cannot be used ({type(error).__name__})") from None
    if chain is None:
        require_plugins(plugins_of(folder), str(folder.path))
        raise folder.refused(f"its recipe makes no model ({one_line(str(found.problems[0]), 300)})")
    if len(lineage.events) >= len(chain.configs):
        raise folder.refused("it has more growths behind it than its recipe has stages")
    history = History(recipe, chain, lineage)
    num_layers = history.config.num_layers
    if num_layers != folder.manifest.num_layers:
        reason = f"its manifest says {folder.manifest.num_layers:,} layers, recipe and lineage {num_layers:,}"
        raise folder.refused(reason)
    return history


def recipe_of(folder: StepFolder) -> Recipe:
    """The recipe that a checkpoint was written with. Nothing that it names is imported.

    Raises:
        CheckpointError: when it cannot be read.
    """
    table = folder.recipe_table()
    try:
        return recipe_from_toml(table)
    except ValidationError as error:
        reason = first_problem(error)
    except (ValueError, TypeError, RecursionError) as error:
        reason = one_line(str(error), 200)
    raise folder.refused(f"its recipe cannot be read ({reason})")


def plugins_of(folder: StepFolder) -> list[str]:
    """The modules that a checkpoint's recipe names. Raises CheckpointError when that cannot be told."""
    named = folder.recipe_table().get(PLUGINS_KEY, [])
    if not isinstance(named, list) or not all(isinstance(name, str) and len(name) < 200 for name in named):
        raise folder.refused("its recipe cannot be read (plugins are no list of names)")
    return [one_line(name) for name in named]


def problem_of(folder: StepFolder) -> str | None:
    """What is wrong with a checkpoint, short of reading its shards; None when nothing is.

    Raises:
        ConfigError: when that cannot be told without a plugin. The checkpoint may be a good one, so no run passes it
            over.
    """
    small_files = (METADATA, RECIPE, LINEAGE)
    if unlisted := [name for name in small_files if name not in folder.manifest.files]:
        return f"its manifest does not list {unlisted[0]}"
    try:
        if damage := folder.damage(checksums=True, names=small_files):
            return damage
        history = history_of(folder)
        return listing_problem(folder) or _tensor_problem(folder, history)
    except CheckpointError as error:
        return error.reason


def whole_problem(folder: StepFolder) -> str | None:
    """What is wrong with the shards of a checkpoint, read in full; None when nothing is."""
    from titan_growth.checkpoint.reader import misplaced

    return folder.damage(checksums=True) or misplaced(folder.path)


def listing_problem(folder: StepFolder) -> str | None:
    """What is wrong with the metadata of a checkpoint with a manifest, or None.

    It may list tensors only, in files that the manifest lists and that hold little else.

    Raises:
        CheckpointError: when the metadata cannot be read.
    """
    from titan_growth.checkpoint.reader import SafeReader

    reader = SafeReader(folder.path)
    metadata = reader.read_metadata()
    if others := sorted(metadata.state_dict_metadata.keys() - reader.tensor_entries().keys()):
        return f"it holds {others[0]}, which is no tensor"
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    files = folder.manifest.files
    if unlisted := sorted(ends.keys() - files.keys()):
        return f"its manifest does not list {unlisted[0]}, which its metadata names"
    for name in sorted(files.keys() - {METADATA, RECIPE, LINEAGE}):
        if (spare := files[name]["bytes"] - ends.get(name, 0)) > SPARE_BYTES:
            return f"{name} has {spare:,} bytes that belong to nothing"
    return None


def _tensor_problem(folder: StepFolder, history: History) -> str | None:
    """How the metadata differs from the tensors of the model, or None."""
    import torch

    from titan_growth.checkpoint.reader import SafeReader

    config, entries = history.config, SafeReader(folder.path).tensor_entries()
    if config.num_layers > len(entries):
        return f"it has {len(entries):,} tensors, too few for {config.num_layers:,} layers"
    with torch.device("meta"):
        wanted: Mapping[str, Any] = family_module(history.recipe.model.name).Decoder(config, 8).state_dict()
    if missing := [name for name in wanted if name not in entries]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return f"it has no {missing[0]}{more}"
    for name, tensor in wanted.items():
        if entries[name].size != tensor.shape:
            return f"its {name} is {tuple(entries[name].size)}, and {tuple(tensor.shape)} by its recipe"
    return None


def _too_large(value: Any, key: str = "") -> Iterator[str]:
    """Sizes in a recipe that no real model has."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _too_large(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        if len(value) > LARGEST >> 8:
            yield f"{key} has {len(value):,} items"
        for item in value:
            yield from _too_large(item, key)
    elif isinstance(value, int) and abs(value) > (LARGEST >> 6 if key.endswith("layers") else LARGEST):
        yield f"{key} is {value:.3e}" if abs(value) < 10**300 else f"{key} is beyond all measure"
