"""Corpora that are Hugging Face datasets: from the hub, from its local cache, or from a folder on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from titan_growth.data.content import ContentHashes, marked
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.readers import Document, missing_key, reading
from titan_growth.tools.errors import DataError
from titan_growth.tools.packages import missing_package

_BATCH_ROWS = 256

_SHORT_NAMES: dict[str, tuple[str, str, str | None]] = {
    "c4": ("allenai/c4", "en", None),
    "c4_validation": ("allenai/c4", "en", "validation"),
}
"""torchtitan's names -> dataset on the hub, subset, and split (None: the recipe's)."""

SAVED_NAMES = ("dataset_dict.json", "state.json", "dataset_info.json")
"""What `save_to_disk` writes: the first, or both others."""


class HubCorpus(Corpus):
    """One column of a map-style Hugging Face dataset; a row is a document."""

    def __init__(self, origin: str, dataset: Any, text_key: str, identity: str) -> None:
        self._origin = origin
        self._text_key = text_key
        self._identity = f"{identity}-{text_key}-{len(dataset)}"
        self._arrow_files = [Path(entry["filename"]) for entry in dataset.cache_files]
        if text_key not in dataset.column_names:
            raise DataError(missing_key(origin, text_key, list(dataset.column_names)))
        column_type = getattr(dataset.features[text_key], "dtype", "not a plain column")
        if column_type not in ("string", "large_string"):
            raise DataError(
                f"{origin}: the field {text_key!r} is {column_type}, not a string. Name another one as text_key"
            )
        if len(dataset) == 0:
            raise DataError(f"{origin}: empty (0 rows). Use another split or subset")
        self._dataset = dataset.select_columns([text_key]).with_format(None)

    @property
    def num_bytes(self) -> int | None:
        return int(self._dataset.data.nbytes)

    def describe(self) -> str:
        return f"{self._origin} ({len(self._dataset)} rows)"

    def fingerprint(self, hashes: ContentHashes) -> str:
        # Not the library's own fingerprint: a saved folder repeats the one it was saved with, whatever was put there.
        if self._arrow_files:
            base = self._arrow_files[0].parent
            with reading(base):
                files = [marked(path, os.path.relpath(path, base)) for path in self._arrow_files]
            contents = hashes.of(str(base), files)
        else:  # in memory, and so not large
            contents = [hashlib.sha256(text.encode()).hexdigest() for text in self.documents()]
        return f"{self._identity}-{hashlib.sha256(' '.join(contents).encode()).hexdigest()}"

    def document_parts(self, start: int = 0) -> Iterator[Document]:
        for first_row in range(start, len(self._dataset), _BATCH_ROWS):
            try:
                texts = self._dataset[first_row : first_row + _BATCH_ROWS][self._text_key]
            except Exception as error:  # a damaged Arrow file can fail anywhere
                raise DataError(
                    f"{self._origin}: row {first_row}: cannot be read ({_first_line(error)}). Download or save it again"
                ) from error
            for row, text in enumerate(texts, start=first_row):
                if text is None:
                    raise DataError(f"{self._origin}: row {row}: the field {self._text_key!r} is null. Remove the row")
                yield (text,)


def is_saved_dataset(names: set[str]) -> bool:
    """Whether these are the files of a folder written by `save_to_disk`."""
    return SAVED_NAMES[0] in names or names.issuperset(SAVED_NAMES[1:])


def load_from_hub(spec: CorpusSpec) -> Corpus:
    """The dataset that `spec.dataset` names, downloaded in full. Raises DataError if it cannot be loaded."""
    datasets = _library(spec.key.removesuffix("_path"))
    origin = f"dataset {spec.dataset!r}"
    name, usual_subset, own_split = _SHORT_NAMES.get(spec.dataset, (spec.dataset, None, None))
    subset, split = spec.subset or usual_subset, own_split or spec.split
    try:
        # Not streamed: preparation resumes from any row, and the files are hashed.
        dataset = datasets.load_dataset(name, subset, split=split, streaming=False)
    except Exception as error:  # library, hub and network each raise their own
        raise DataError(
            f"{origin}: cannot be loaded from the Hugging Face hub, subset {subset!r}, split {split!r} "
            f"({_first_line(error)}). Check the names and the network, set dataset_path to local files, "
            'or use dataset = "stdlib"'
        ) from error
    return HubCorpus(origin, dataset, spec.text_key, f"hub-{name}-{subset}-{split}")


def load_saved(spec: CorpusSpec, path: Path) -> Corpus:
    """The dataset in a folder written by `save_to_disk`. Raises DataError if it is damaged or lacks the split."""
    datasets = _library(spec.key)
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder can fail anywhere
        raise DataError(f"{path}: damaged saved dataset ({_first_line(error)}). Save it again") from error
    if isinstance(dataset, datasets.DatasetDict):
        if spec.split not in dataset:
            raise DataError(f"{path}: no split {spec.split!r}; it has: {', '.join(dataset)}. Set split to one of them")
        dataset = dataset[spec.split]
    return HubCorpus(str(path), dataset, spec.text_key, f"saved-{spec.split}")


def _library(key: str) -> Any:
    """The package `datasets`. Raises DataError, which names the key that needs it, if it is not installed."""
    if problem := missing_package(key, "datasets", "name files of text or JSON"):
        raise DataError(str(problem))
    return import_module("datasets")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
