"""What a corpus is, and what a recipe says about one.

A corpus is a deterministic sequence of documents. It can be read from any document on (to resume a preparation), and
knows its approximate size and a fingerprint of its inputs.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

from titan_growth.data.content import ContentHashes
from titan_growth.data.readers import Document

STDLIB = "stdlib"


@dataclass(frozen=True)
class CorpusSpec:
    """A recipe's corpus.

    dataset: "stdlib" or a Hugging Face dataset; with dataset_path, "text", "json" or "parquet" forces the kind of the
        files (any other name: by extension).
    dataset_path: a file, a folder (recursive) or a glob, as a path or URL; or a folder written by `save_to_disk`.
    text_key: the field with the text, in JSON lines, parquet and Hugging Face datasets.
    split, subset: of a Hugging Face dataset.
    key: the recipe key of dataset_path, for messages.
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
        """What it is and how large, in one line for logs."""

    @abc.abstractmethod
    def fingerprint(self, hashes: ContentHashes) -> str:
        """A string that changes exactly when the content of the inputs does, wherever they lie. Raises DataError."""

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int | None:
        """Approximate size of the text, None if unknown."""

    @abc.abstractmethod
    def document_parts(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on, each as text parts to be used up before the next document.

        Raises DataError, with file and position, at the first thing that cannot be read.
        """

    def documents(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on, each as one string. Raises DataError like `document_parts`."""
        return ("".join(parts) for parts in self.document_parts(start))
