"""The files of a Hugging Face folder that are not weights: tokenizer, chat template, generation settings.

They are copied unchanged, under known names only; code is never copied. A tokenizer without a Hugging Face file (a
sentencepiece model, plain bytes) is written as an equivalent `tokenizer.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.config.schema.recipe import Recipe
from titan_growth.data.storage import cache_root
from titan_growth.data.tokenizers import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from titan_growth.interchange.folder import CONFIG
from titan_growth.interchange.safetensors_file import parse_json
from titan_growth.interchange.tokenizer_json import of_bytes, of_sentencepiece
from titan_growth.tools.errors import CheckpointError, DataError, RefusedCheckpointError
from titan_growth.tools.location import local_path

TOKENIZER_JSON, TOKENIZER_MODEL, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
ASSETS = (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Copied if present."""

_MAX_BYTES = 512 * 2**20
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def checked_assets(source: Path, names: Sequence[str] = ASSETS) -> dict[str, Path]:
    """Name -> the file to copy, for those of the names that the folder has.

    Raises:
        CheckpointError: if one links out of the folder (except into the blobs of a Hugging Face cache), is too large,
            or is named .json but is not JSON.
    """
    root = source.resolve()
    found = {}
    for name in names:
        path = (source / name).resolve()
        if not path.is_file():
            continue
        if path.parent != root and path.parent != root.parent.parent / "blobs":
            raise RefusedCheckpointError(source.name, f"its {name} is a link that leads out of it")
        if path.stat().st_size > _MAX_BYTES:
            raise RefusedCheckpointError(source.name, f"its {name} has {path.stat().st_size:,} bytes")
        if name.endswith(".json"):
            parse_json(path.read_bytes(), source.name, f"its {name}")
        found[name] = path
    return found


def copy_assets(assets: Mapping[str, Path], target: Path) -> None:
    """Copies the files under their names. Raises OSError."""
    for name, path in assets.items():
        shutil.copyfile(path, target / name)


@dataclass
class ExportedTokenizer:
    """The tokenizer files to write into a Hugging Face folder."""

    summary: str
    """What it is, for the command's output."""
    copied: dict[str, Path] = field(default_factory=dict)
    """Name -> file to copy."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Name -> content to write."""
    tokens: dict[str, Any] = field(default_factory=lambda: {"bos_token_id": None, "eos_token_id": None})
    """Keys of config.json. Leaving one out would not mean none: transformers defaults to Llama 2's ids."""

    def write(self, target: Path) -> None:
        """Writes and copies the files. Raises OSError."""
        copy_assets(self.copied, target)
        for name, data in self.files.items():
            (target / name).write_bytes(data)


def tokenizer_of(folder: StepFolder, recipe: Recipe, max_seq_len: int) -> ExportedTokenizer:
    """The tokenizer that a checkpoint was trained with.

    Looks in the step folder (an imported one has it), then where the recipe points, then, for one trained on the
    corpus, in the cache by the checkpoint's fingerprint.

    Args:
        max_seq_len: longest sequence of the model, as its config.json has it.
    """
    try:
        if CONFIG in folder.manifest.files:
            has_one = bool({TOKENIZER_JSON, TOKENIZER_MODEL} & folder.manifest.files.keys())
            imported = f"the tokenizer of {folder.path.name}"
            return _copied(folder.path, imported if has_one else "without tokenizer: it was imported without one")
        return _from_recipe(folder, recipe, max_seq_len)
    except (DataError, CheckpointError) as error:
        return ExportedTokenizer(f"without tokenizer: {error}")


def _from_recipe(folder: StepFolder, recipe: Recipe, max_seq_len: int) -> ExportedTokenizer:
    wanted = folder.manifest.data.get("tokenizer")
    found = _find(recipe, wanted)
    if found is None:
        return ExportedTokenizer("without tokenizer: the recipe names none, and the one it trained is not in the cache")
    tokenizer, path = found.tokenizer, found.path
    if wanted is not None and tokenizer.fingerprint()[: len(wanted)] != wanted:
        return ExportedTokenizer(f"without tokenizer: {path} is not the one the model was trained with")
    if path is not None and path.is_dir() and isinstance(tokenizer, HuggingFaceTokenizer):
        copied = _copied(path, f"the tokenizer of {path}")
        if not (path / CONFIG).is_file():
            copied.tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        return copied
    return _made(tokenizer, recipe, max_seq_len)


@dataclass(frozen=True)
class _Found:
    tokenizer: Tokenizer
    path: Path | None = None
    """None if it has no files."""


def _find(recipe: Recipe, wanted: str | None) -> _Found | None:
    data = recipe.data
    if data.tokenizer == "bytes":
        return _Found(BytesTokenizer())
    named = data.tokenizer_path or recipe.model.hf_assets_path
    if named is not None and (data.tokenizer_path is not None or local_path(named).exists()):
        path = local_path(named)
        tokenizer = load_tokenizer(path, data.tokenizer, allow_special_tokens=data.allow_special_tokens)
        return _Found(tokenizer, path)
    root = cache_root(local_path(data.cache_dir) if data.cache_dir else None) / "tokenizers"
    if wanted is not None:
        for path in sorted(root.glob("*.model")):
            tokenizer = SentencePieceTokenizer(path)
            if tokenizer.fingerprint()[: len(wanted)] == wanted:
                return _Found(tokenizer, path)
    return None


def _copied(folder: Path, summary: str) -> ExportedTokenizer:
    """The tokenizer files of a Hugging Face folder, and the special tokens of its config.json."""
    found = ExportedTokenizer(summary, checked_assets(folder))
    if (folder / CONFIG).is_file():
        table = parse_json((folder / CONFIG).read_bytes(), folder.name, f"its {CONFIG}")
        found.tokens = {key: table[key] for key in _TOKENS if key in table}
    return found


def _made(tokenizer: Tokenizer, recipe: Recipe, max_seq_len: int) -> ExportedTokenizer:
    """Files that `AutoTokenizer` reads, for a tokenizer that is not in a Hugging Face folder."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    found = ExportedTokenizer("", tokens=dict(ids))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found.summary = f"the {tokenizer.name}"
        found.files = tokenizer.files()
        if TOKENIZER_CONFIG in found.files:
            return found
        names = {role: tokenizer.decode([token]) for role, token in ids.items() if token is not None}
        settings |= {role.removesuffix("_id"): name for role, name in names.items()}
    else:
        if isinstance(tokenizer, SentencePieceTokenizer):
            made = of_sentencepiece(tokenizer, adds_bos=recipe.data.bos)
            found.files = tokenizer.files()
        else:
            made = of_bytes(tokenizer, adds_bos=recipe.data.bos)
        if made is None:
            settings["tokenizer_class"] = "LlamaTokenizer"
            found.summary = f"the {tokenizer.name} as it is: AutoTokenizer may read it differently"
        else:
            found.summary = f"the {tokenizer.name} as {TOKENIZER_JSON}"
            found.files[TOKENIZER_JSON] = made.text.encode()
            settings |= made.special_tokens
    settings["model_max_length"] = max_seq_len
    found.files[TOKENIZER_CONFIG] = (json.dumps(settings, indent=2) + "\n").encode()
    return found
