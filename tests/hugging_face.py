"""Hugging Face folders for tests, made by `transformers`, and what it computes with them."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from titan_growth.checkpoint.reader import SafeReader
from titan_growth.commands.source import open_source, whole_tensor
from titan_growth.models.registry import family_module

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""Of a model whose first context was so short that scaling matters within a test's sequence."""


def make_folder(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A folder of many safetensors files, with weights that no two tensors share."""
    import transformers

    kind = {"llama": "Llama", "qwen3": "Qwen3"}[family]
    # A copy: transformers writes into what it is given.
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**SIZES, "rope_theta": 1e4, **settings}))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (1.0 if parameter.dim() == 1 else 0)
    model.to(dtype).save_pretrained(path, max_shard_size="20KB")
    return path


def their_model(path: Path) -> Any:
    """The model of a folder, in float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path).float().eval()


def their_logits(path: Path, tokens: Tensor) -> Tensor:
    """(B, S, V) by transformers."""
    with torch.no_grad():
        logits: Tensor = their_model(path)(tokens).logits
    return logits


def our_logits(step_folder: Path, tokens: Tensor) -> Tensor:
    """(B, S, V) by our model with a checkpoint's weights, in float32."""
    opened = open_source(step_folder)
    model = family_module(opened.recipe.model.name).Decoder(opened.config, tokens.shape[1])
    model.materialized(torch.device("cpu"))
    tensors = stored(step_folder)
    model.load_state_dict({name: tensors[name].float() for name in model.state_dict()})
    with torch.no_grad():
        logits: Tensor = model(tokens)
    return logits


def stored(step_folder: Path) -> dict[str, Tensor]:
    """Every tensor of a step folder, whole."""
    reader = SafeReader(step_folder)
    sizes = {name: tuple(entry.size) for name, entry in reader.tensor_entries().items()}
    return {name: whole_tensor(reader, chunks, sizes[name]) for name, chunks in reader.chunks().items()}


def weights_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the safetensors library reads them."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def some_tokens(num_tokens: int = 64) -> Tensor:
    """(2, S)."""
    return torch.randint(0, 256, (2, num_tokens), generator=torch.Generator().manual_seed(1))


def edit_config(path: Path, **values: Any) -> None:
    """Changes keys of a folder's config.json; None removes one."""
    table = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
