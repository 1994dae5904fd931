"""What a corpus is, and what a recipe says about one.

A corpus is a deterministic sequence of documents. It can be read from any document on (so that an interrupted
preparation goes on where it was), it knows about how large it is, and it has a fingerprint that changes when its inputs
do.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

from titan_growth.data.readers import Document

STDLIB = "stdlib"


@dataclass(frozen=True)
class CorpusSpec:
    """What the recipe says about a corpus.

    dataset: "stdlib", a Hugging Face dataset name, or, with dataset_path, "text", "json" or "parquet" to force a kind
        (any other name then means: by extension).
    dataset_path: a file, a folder (recursive), a glob, or a folder written by `datasets.Dataset.save_to_disk`; or a URL
        of one of the first three.
    text_key: the field that holds the text, in JSON lines, parquet and Hugging Face datasets.
    split, subset: of a Hugging Face dataset.
    key: of the recipe, where dataset_path was said; messages about URLs name it.
    """

    dataset: str = STDLIB
    dataset_path: str | None = None
    text_key: str = "text"
    split: str = "train"
    subset: str | None = None
    key: str = "training.dataset_path"


class Corpus(abc.ABC):
    """A deterministic sequence of documents."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line for logs: what it is and how large."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A string that stays the same exactly as long as the inputs do."""

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int | None:
        """About how many bytes of text there are, or None if that is unknown."""

    @abc.abstractmethod
    def document_parts(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on, each as an iterable of text parts, to be used up before the next one.

        Raises DataError, with file and position, at the first thing that cannot be read.
        """

    def documents(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on, each as one string. Raises DataError like `document_parts`."""
        return ("".join(parts) for parts in self.document_parts(start))
