"""A Hugging Face folder: what it claims to hold, checked against its files.

Only JSON and safetensors headers are read here. Pickled weights (`.bin`) are never opened, and no code of a folder is
run. Claimed sizes are checked against the files before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_growth.checkpoint.untrusted.files import is_plain_name
from titan_growth.config.schema.model import ModelConfig
from titan_growth.interchange.config_json import described_model, layout_of
from titan_growth.interchange.safetensors_file import StoredTensor, have_equal_values, parse_json, read_header
from titan_growth.models.config import DecoderConfig
from titan_growth.models.hugging_face import HuggingFaceLayout, parameter_shapes
from titan_growth.models.registry import family_module
from titan_growth.tools.errors import RefusedCheckpointError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_MAX_CONFIG_BYTES, _MAX_INDEX_BYTES = 10_000_000, 1_000_000_000
_PICKLED = ("*.bin", "*.pth", "*.pt")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A checked folder: every parameter of its model is there, with the right shape and a supported dtype."""

    path: Path
    section: ModelConfig
    """The `[model]` table equivalent to its config.json."""
    config: DecoderConfig
    tensors: dict[str, StoredTensor]
    """Our parameter name -> where it is stored. A tied head is listed under both names."""

    @property
    def layout(self) -> HuggingFaceLayout:
        return layout_of(self.section.name)

    @property
    def num_bytes(self) -> int:
        """Size of the weights; a tied head counts once."""
        return sum({one.name: one.num_bytes for one in self.tensors.values()}.values())


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is in Hugging Face's format, judging by its files. A step folder never is."""
    if (path / ".metadata").exists():
        return False
    return any((path / name).exists() for name in (CONFIG, INDEX, SINGLE))


def open_folder(path: Path) -> HuggingFaceFolder:
    """Reads and checks a folder.

    Raises:
        CheckpointError: if it is damaged, contradicts itself, or its model is not supported.
    """
    try:
        table = _json(path, CONFIG, _MAX_CONFIG_BYTES)
        model = described_model(table, path.name)
        stored = _stored(path)
    except OSError as error:
        where = f"{Path(error.filename).name}: " if error.filename else ""
        raise RefusedCheckpointError(path.name, f"{where}{error.strerror or error}") from None
    tensors = _parameters(path, model.section.name, model.config, stored)
    _require_one_value(path, tensors, model.config, layout_of(model.section.name), stored)
    return HuggingFaceFolder(path, model.section, model.config, tensors)


def _json(path: Path, name: str, max_bytes: int) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        raise RefusedCheckpointError(path.name, f"it has no {name}")
    if file.stat().st_size > max_bytes:
        raise RefusedCheckpointError(path.name, f"its {name} has {file.stat().st_size:,} bytes")
    return parse_json(file.read_bytes(), path.name, f"its {name}")


def _stored(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files by stored name. As in transformers: one file, else those of the index."""
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if not (path / INDEX).is_file():
        pickled = next((file.name for pattern in _PICKLED for file in sorted(path.glob(pattern))), None)
        if pickled is not None:
            why = f"its weights are pickled ({pickled}), which can run anything when read. Convert them to safetensors"
        else:
            why = f"it has neither {SINGLE} nor {INDEX}"
        raise RefusedCheckpointError(path.name, why)
    weight_map = _json(path, INDEX, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise RefusedCheckpointError(path.name, f"its {INDEX} has no weight_map")
    files = sorted(set(weight_map.values()))
    for name in files:
        if not is_plain_name(name) or name.startswith(".") or not name.endswith(".safetensors"):
            raise RefusedCheckpointError(path.name, f"its {INDEX} names the file {name!a:.100}")
        if not (path / name).is_file():
            raise RefusedCheckpointError(path.name, f"it has no {name}, which its {INDEX} names")
    stored: dict[str, StoredTensor] = {}
    for name in files:
        for tensor, where in read_header(path / name).items():
            if weight_map.get(tensor) != name:
                listed = f"lists it in {weight_map[tensor]}" if tensor in weight_map else "does not list it"
                raise RefusedCheckpointError(path.name, f"{_shown(tensor)} is in {name}, but its {INDEX} {listed}")
            stored[tensor] = where
    if missing := sorted(weight_map.keys() - stored.keys()):
        file = weight_map[missing[0]]
        raise RefusedCheckpointError(path.name, f"{file} has no {_shown(missing[0])}, which its {INDEX} lists")
    return stored


def _shown(name: str) -> str:
    """An untrusted tensor name, on one line."""
    return (name if name.isprintable() else ascii(name))[:100]


def _parameters(
    path: Path, family: str, config: DecoderConfig, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Our parameter name -> where it is stored. Raises CheckpointError if one is missing, misfits or is left over."""
    layout = layout_of(family)
    if config.num_layers > len(stored):
        raise RefusedCheckpointError(
            path.name, f"its config.json has {config.num_layers:,} layers, its files {len(stored):,} tensors"
        )
    found: dict[str, StoredTensor] = {}
    for parameter, shape in parameter_shapes(config, family_module(family).ROLES):
        name = layout.name_of(config.tied.get(parameter, parameter))
        tensor = stored.get(name)
        if tensor is None:
            raise RefusedCheckpointError(path.name, f"it has no {name}")
        if tensor.shape != shape:
            sizes = [" x ".join(f"{size:,}" for size in sizes) or "a scalar" for sizes in (tensor.shape, shape)]
            raise RefusedCheckpointError(path.name, f"{name} is {sizes[0]}, but its config.json says {sizes[1]}")
        if tensor.dtype not in _FLOATS:
            raise RefusedCheckpointError(path.name, f"{name} is stored as {tensor.dtype}, which is quantised")
        found[parameter] = tensor
    known = {tensor.name for tensor in found.values()} | {layout.name_of(copy) for copy in config.tied}
    unknown = sorted(name for name in stored.keys() - known if not name.endswith(layout.ignored))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise RefusedCheckpointError(path.name, f"it has {_shown(unknown[0])}{more}, which the model does not have")
    return found


def _require_one_value(
    path: Path,
    tensors: dict[str, StoredTensor],
    config: DecoderConfig,
    layout: HuggingFaceLayout,
    stored: dict[str, StoredTensor],
) -> None:
    """Raises CheckpointError if a tied parameter is stored twice with two values: one would be left out in silence."""
    for copy in config.tied:
        name, original = layout.name_of(copy), tensors[copy]
        if name == original.name or name not in stored:
            continue
        try:
            equal = have_equal_values(path, stored[name], original)
        except OSError as error:
            raise RefusedCheckpointError(path.name, f"{name} cannot be read ({error.strerror or error})") from None
        if not equal:
            why = f"{name} is not {original.name}, though its {CONFIG} says tie_word_embeddings = true"
            hint = f"Say false there if the head was trained apart, or take {name} out of its files"
            raise RefusedCheckpointError(path.name, f"{why}. {hint}")
