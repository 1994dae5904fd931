"""Corpora that are Hugging Face datasets: from the hub, from its local cache, or from a folder on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from titan_growth.data.account import Account
from titan_growth.data.content import ContentHashes, marked
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.readers.documents import Document
from titan_growth.data.readers.place import Place, UnusableError, reading
from titan_growth.data.readers.rows import Pass, ReadRules, Row, Skip
from titan_growth.data.readers.text_rule import KEY, is_there, lookup, missing, names_in
from titan_growth.tools.errors import DataError
from titan_growth.tools.packages import missing_package
from titan_growth.tools.text import one_line

_BATCH_ROWS = 256
DATASET = "dataset"
"""The kind of its files, in the account."""

_SHORT_NAMES: dict[str, tuple[str, str, str | None]] = {
    "c4": ("allenai/c4", "en", None),
    "c4_validation": ("allenai/c4", "en", "validation"),
}
"""torchtitan's names -> dataset on the hub, subset, and split (None: the recipe's)."""

SAVED_NAMES = ("dataset_dict.json", "state.json", "dataset_info.json")
"""What `save_to_disk` writes: the first, or both others."""


class HubCorpus(Corpus):
    """A map-style Hugging Face dataset; a row is a document."""

    def __init__(self, origin: str, dataset: Any, rules: ReadRules, identity: str) -> None:
        self._origin = origin
        self._rules = rules
        bad_rows = "" if rules.max_bad_rows is None else "-skip"
        self._identity = f"{identity}-{rules.text.text_key}-{len(dataset)}{bad_rows}"
        self._arrow_files = [Path(entry["filename"]) for entry in dataset.cache_files]
        for name in rules.text.fields:
            _require_text(origin, dataset.features, name)
        if len(dataset) == 0:
            raise DataError(f"{origin}: empty (0 rows). Use another split or subset")
        columns = {name if name in dataset.features else name.split(".")[0] for name in rules.text.fields}
        self._dataset = dataset.select_columns(sorted(columns)).with_format(None)

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

    def account(self) -> Account:
        account = Account()
        with reading(Path(self._origin)):
            account.add_files(DATASET, [path.stat().st_size for path in self._arrow_files])
        return account

    def document_parts(self, start: int = 0, account: Account | None = None) -> Iterator[Document]:
        this = Pass(self._rules, Skip(start), self.account() if account is None else account)
        this.account.begin(DATASET, 0)
        place = Place(Path(self._origin), "")
        with reading(place):
            for text in this.texts(self._rows(this.skip.take(start) if this.skips_unread else 0, place), place):
                yield (text,)

    def _rows(self, first: int, place: Place) -> Iterator[Row]:
        """The rows from a number on. Raises UnusableError."""
        for first_of_batch in range(first, len(self._dataset), _BATCH_ROWS):
            place.row = f"row {first_of_batch}"
            try:
                batch = self._dataset[first_of_batch : first_of_batch + _BATCH_ROWS]
            except Exception as error:  # a damaged Arrow file can fail anywhere
                raise UnusableError(f"cannot be read ({_first_line(error)})", "Download or save it again") from error
            for number, values in enumerate(zip(*batch.values(), strict=True), start=first_of_batch):
                place.row = f"row {number}"
                yield Row(partial(dict, zip(batch, values, strict=True)))


def _require_text(origin: str, features: Any, name: str) -> None:
    """Raises DataError unless a field, or nested field, is there and holds text."""
    if not is_there(features, name):
        raise DataError(f"{origin}: {missing(name, names_in(features))}")
    kind = getattr(lookup(features, name), "dtype", "not a plain column")
    if kind not in ("string", "large_string"):
        raise DataError(f"{origin}: the field {name!r} is {kind}, not a string. Name another one as {KEY}")


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
    return HubCorpus(origin, dataset, spec.rules, f"hub-{name}-{subset}-{split}")


def load_saved(spec: CorpusSpec, path: Path) -> Corpus:
    """The dataset in a folder written by `save_to_disk`. Raises DataError if it is damaged or lacks the split."""
    datasets = _library(spec.key)
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder can fail anywhere
        raise DataError(f"{path}: damaged saved dataset ({_first_line(error)}). Save it again") from error
    if isinstance(dataset, datasets.DatasetDict):
        if spec.split not in dataset:
            raise DataError(
                f"{path}: no split {spec.split!r}; it has: {', '.join(dataset)}. Set data.split to one of them"
            )
        dataset = dataset[spec.split]
    return HubCorpus(str(path), dataset, spec.rules, f"saved-{spec.split}")


def _library(key: str) -> Any:
    """The package `datasets`. Raises DataError, which names the key that needs it, if it is not installed."""
    if problem := missing_package(key, "datasets", "name files of text or JSON"):
        raise DataError(str(problem))
    return import_module("datasets")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return one_line(text.splitlines()[0], 300) if text else type(error).__name__
