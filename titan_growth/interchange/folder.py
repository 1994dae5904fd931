"""A Hugging Face folder: what it says it holds, and whether its files agree.

Only JSON and safetensors headers are read here; pickled weights (`.bin`) are never opened, and nothing a folder brings
along is run. All sizes are compared with those of the files before memory is taken for anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_growth.checkpoint.untrusted.files import is_plain_name
from titan_growth.config.schema.model import ModelConfig
from titan_growth.interchange.config_json import described_model, layout_of
from titan_growth.interchange.safetensors_file import StoredTensor, parse_json, read_header
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
    """A folder that has been checked: every parameter of its model is there, of the right size and a type that fits."""

    path: Path
    section: ModelConfig
    """The `[model]` table that means the same as its config.json."""
    config: DecoderConfig
    tensors: dict[str, StoredTensor]
    """Our parameter -> where it is. A head that is the embedding, too, is listed under both names."""

    @property
    def layout(self) -> HuggingFaceLayout:
        return layout_of(self.section.name)

    @property
    def num_bytes(self) -> int:
        """Of the weights; those that are listed twice count once."""
        return sum({one.name: one.num_bytes for one in self.tensors.values()}.values())


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is one of Hugging Face's, by its files; a step folder of ours is none, whatever else it has."""
    if (path / ".metadata").exists():
        return False
    return any((path / name).exists() for name in (CONFIG, INDEX, SINGLE))


def open_folder(path: Path) -> HuggingFaceFolder:
    """Reads and checks a folder.

    Raises:
        CheckpointError: when it is damaged, contradicts itself, or holds a model that there is no place for here.
    """
    try:
        table = _json(path, CONFIG, _MAX_CONFIG_BYTES)
        model = described_model(table, path.name)
        stored = _stored(path)
    except OSError as error:
        where = f"{Path(error.filename).name}: " if error.filename else ""
        raise RefusedCheckpointError(path.name, f"{where}{error.strerror or error}") from None
    tensors = _parameters(path, model.section.name, model.config, stored)
    return HuggingFaceFolder(path, model.section, model.config, tensors)


def _json(path: Path, name: str, max_bytes: int) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        raise RefusedCheckpointError(path.name, f"it has no {name}")
    if file.stat().st_size > max_bytes:
        raise RefusedCheckpointError(path.name, f"its {name} has {file.stat().st_size:,} bytes")
    return parse_json(file.read_bytes(), path.name, f"its {name}")


def _stored(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, under the names that these have. As transformers looks for them:
    one file, or else those that the index names."""
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
                said = f"in {weight_map[tensor]}" if tensor in weight_map else "nowhere"
                raise RefusedCheckpointError(path.name, f"{_shown(tensor)} is in {name}, and {said} by its {INDEX}")
            stored[tensor] = where
    if missing := sorted(weight_map.keys() - stored.keys()):
        file = weight_map[missing[0]]
        raise RefusedCheckpointError(path.name, f"{file} has no {_shown(missing[0])}, which its {INDEX} says")
    return stored


def _shown(name: str) -> str:
    """A stranger's name of a tensor, on one line."""
    return (name if name.isprintable() else ascii(name))[:100]


def _parameters(
    path: Path, family: str, config: DecoderConfig, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Our parameters and where they are. Raises CheckpointError for what is missing, does not fit, or is too much."""
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
            raise RefusedCheckpointError(path.name, f"{name} is {sizes[0]}, and {sizes[1]} by its config.json")
        if tensor.dtype not in _FLOATS:
            raise RefusedCheckpointError(path.name, f"{name} is stored as {tensor.dtype}, which is quantised")
        found[parameter] = tensor
    known = {tensor.name for tensor in found.values()} | {layout.name_of(copy) for copy in config.tied}
    unknown = sorted(name for name in stored.keys() - known if not name.endswith(layout.ignored))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise RefusedCheckpointError(path.name, f"it has {_shown(unknown[0])}{more}, for which there is no place here")
    return found
