"""`python -m titan_growth export`: a step folder becomes a Hugging Face folder.

The checkpoint may be of any mesh: one tensor at a time is assembled from its chunks and written, so only the largest
has to fit into memory. config.json comes last; without it the folder is not taken for a model.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import torch
from torch import Tensor

from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.commands.args import CommandLine
from titan_growth.commands.foreign import open_with_recipe
from titan_growth.commands.source import Source, whole_tensor
from titan_growth.commands.target import new_folder, require_new
from titan_growth.config.plugins import load_plugins
from titan_growth.interchange.config_json import config_json, layout_of
from titan_growth.interchange.folder import CONFIG, INDEX, SINGLE, is_hugging_face
from titan_growth.interchange.reader import in_halves
from titan_growth.interchange.safetensors_file import total_bytes, write_file
from titan_growth.interchange.tokenizer_files import tokenizer_of
from titan_growth.models.hugging_face import parameter_shapes
from titan_growth.models.parametrization import folded
from titan_growth.models.registry import family_module
from titan_growth.models.roles import shadow_kinds, shadow_prefix
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem
from titan_growth.tools.files import write_atomic
from titan_growth.tools.location import folder_at
from titan_growth.tools.text import gib, many, one_line

MAX_FILE_BYTES = 2 * 2**30
"""Of a safetensors file, unless one tensor has more."""

_DTYPES = ("float32", "bfloat16", "float16")

Shape = tuple[torch.dtype, tuple[int, ...]]


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise ValueError(f"expected one of {', '.join(_DTYPES)}, got '{text}'")
    return text


_LINE = CommandLine(
    "export",
    """Makes a Hugging Face folder of a checkpoint's weights: config.json, safetensors, and the tokenizer's files.
    Moments and counters stay behind. transformers, vLLM and lm-eval read it.""",
    example="--from outputs/checkpoint/step-5000 --to exported",
    statuses="0 written and read back, 1 failed, 2 wrong arguments",
)
_LINE.source_and_target("A committed step folder, written on any mesh, or one of torchtitan.", "The folder to write.")
_LINE.option("--dtype", "TYPE", f"{', '.join(_DTYPES)}. Default: as stored.", _dtype)
_LINE.option("--weights", "KIND", 'Others than those of the model: "ema", its moving average.')
_LINE.recipe_of_another()
_LINE.plugins()


@_LINE.command
def main(args: Namespace) -> int:
    """Writes the folder; returns the exit status."""
    load_plugins(args.plugins)
    source, target, shadow = folder_at(args.source), Path(args.target), args.weights or ""
    print(export_folder(source, target, dtype=args.dtype, shadow=shadow, recipe_file=args.recipe_file))
    return 0


@dataclass(frozen=True)
class _Weight:
    """A tensor to be written."""

    chunks: list[StoredChunk]
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int | None
    factor: float
    """The model's factor of muP or CompleteP; `transformers` has none."""

    def made(self, reader: SafeReader) -> Tensor:
        values = in_halves(whole_tensor(reader, self.chunks, self.shape), self.group)
        if self.factor != 1.0:
            values = values.to(torch.promote_types(values.dtype, torch.float32)) * self.factor
        return values.to(self.dtype)


def export_folder(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    shadow: str = "",
    max_file_bytes: int = MAX_FILE_BYTES,
    recipe_file: str | None = None,
) -> str:
    """Writes a Hugging Face folder; returns one line about it.

    Args:
        dtype: of the weights; None keeps them as stored.
        shadow: the kind of shadow weights to write; those of the model by default.
        recipe_file: has the model of a step folder of another program.

    Raises:
        ConfigError: when the source is not there, or the target in the way.
        CheckpointError: when the source cannot be used, its model has no counterpart in `transformers`, or the target
            cannot be written. Nothing is left behind then.
    """
    if source.is_dir() and is_hugging_face(source):
        raise ConfigError([Problem("--from", f"{source} is a Hugging Face folder already", "Name a step-N folder")])
    opened = open_with_recipe(source, recipe_file)
    require_new(target, source)
    reader = opened.reader()
    weights = _weights(opened, reader, dtype, shadow)
    # The dtype to compute in: that of the matrices, where norms have a wider one.
    usual = mode(weight.dtype for weight in weights.values())
    table = config_json(opened.config, opened.recipe.model.name, str(usual).removeprefix("torch."))
    shapes = {name: (weight.dtype, weight.shape) for name, weight in weights.items()}
    num_bytes = total_bytes(shapes.values())
    with new_folder(target, num_bytes, "the model"):
        tokenizer = tokenizer_of(opened.folder, opened.recipe, table["max_position_embeddings"])
        files = _files(shapes, max_file_bytes)
        for name, names in files.items():
            write_file(target / name, {one: shapes[one] for one in names}, lambda one: weights[one].made(reader))
            _read_back(target / name, names)
        tokenizer.write(target)
        if list(files) != [SINGLE]:
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            write_atomic(target / INDEX, json.dumps(index, indent=2) + "\n")
        write_atomic(target / CONFIG, json.dumps({**table, **tokenizer.tokens}, indent=2, sort_keys=True) + "\n")
    later = (stage.seq_len or 0 for stage in opened.recipe.growth.active_stages[: len(opened.lineage.events)])
    trained = max([opened.recipe.training.seq_len, *later])
    length = table["max_position_embeddings"]
    note = f"; trained on {trained:,} tokens a sequence, config.json allows {length:,}" if trained < length else ""
    return (
        f"{target}: {opened.config.num_params:,} parameters of step {opened.folder.step:,}"
        f"{f', the {shadow},' if shadow else ''} as "
        f"{table['architectures'][0]}, {gib(num_bytes)} in {many(len(files), 'file')}; {tokenizer.summary}{note}"
    )


def _weights(opened: Source, reader: SafeReader, dtype: str | None, shadow: str) -> dict[str, _Weight]:
    """Name there -> what it is made of. A head tied to the embedding is not written twice."""
    prefix = shadow_prefix(shadow) if shadow else ""
    config, family = opened.config, opened.recipe.model.name
    roles = family_module(family).ROLES
    layout, chunks, entries = layout_of(family), reader.chunks(), reader.tensor_entries()
    if shadow and shadow not in (kinds := shadow_kinds(entries)):
        hint = f"It has {', '.join(sorted(kinds))}" if kinds else "A run keeps an average with averages.ema_decay"
        raise ConfigError([Problem("--weights", f"{opened.folder.path.name} has no {one_line(shadow)}", hint)])
    weights = {}
    for parameter, shape in parameter_shapes(config, roles):
        if parameter in config.tied:
            continue
        stored = f"{prefix}{parameter}"
        if stored not in chunks:
            raise opened.folder.refused(f"it has no {stored}")
        if (size := tuple(entries[stored].size)) != shape:
            raise opened.folder.refused(f"{stored} is {size}, and {shape} by its recipe")
        weights[layout.name_of(parameter)] = _Weight(
            chunks[stored],
            shape,
            entries[stored].properties.dtype if dtype is None else getattr(torch, dtype),
            layout.group_of(parameter, config),
            folded(config, roles, parameter),
        )
    return weights


def _files(shapes: dict[str, Shape], max_file_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in the order of the model."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = total_bytes([shape])
        if groups[-1] and size + num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}


def _read_back(path: Path, names: list[str]) -> None:
    """Checks with the library that reads such files elsewhere."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            same = sorted(file.keys()) == sorted(names)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read back ({error})") from None
    if not same:
        raise CheckpointError(f"{path}: holds other tensors than it should")
