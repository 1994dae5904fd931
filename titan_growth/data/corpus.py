"""What a corpus is, and what a recipe says about one.

A corpus is a deterministic sequence of documents. It can be read from any document on (to resume a preparation), and
knows its approximate size and a fingerprint of its inputs.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

from titan_growth.data.account import Account
from titan_growth.data.content import ContentHashes
from titan_growth.data.readers.documents import Document
from titan_growth.data.readers.files import TEXT
from titan_growth.data.readers.rows import ReadRules
from titan_growth.data.readers.text_rule import TextRule

STDLIB = "stdlib"


@dataclass(frozen=True)
class CorpusSpec:
    """A recipe's corpus.

    dataset: "stdlib" or a Hugging Face dataset; with dataset_path, a kind (`readers.files.KINDS`) forces that of the
        files (any other name: by extension).
    dataset_path: a file, a folder (recursive) or a glob, as a path or URL; or a folder written by `save_to_disk`.
    text_key: the field with the text, a path to it, or a template over several, in whatever has rows.
    split, subset: of a Hugging Face dataset.
    key: the recipe key of dataset_path, for messages.
    on_bad_row: "stop" at a row without text, or "skip" up to max_bad_rows of them.
    """

    dataset: str = STDLIB
    dataset_path: str | None = None
    text_key: str = "text"
    split: str = "train"
    subset: str | None = None
    key: str = "training.dataset_path"
    on_bad_row: str = "stop"
    max_bad_rows: int = 1000

    @property
    def rules(self) -> ReadRules:
        """How the corpus is read."""
        limit = self.max_bad_rows if self.on_bad_row == "skip" else None
        return ReadRules(TextRule(self.text_key), limit, refuse_markup=self.dataset != TEXT)


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
    def account(self) -> Account:
        """A new account with the files that are read, and those that are left out."""

    @abc.abstractmethod
    def document_parts(self, start: int = 0, account: Account | None = None) -> Iterator[Document]:
        """The documents from number `start` on, each as text parts to be used up before the next document.

        account: a new one (`account`), for this pass alone; it is told which documents are of which kind, and what is
            left out from the beginning of the corpus on, whatever `start` is.

        Raises DataError, with file and position, at the first thing that cannot be read.
        """

    def documents(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on, each as one string. Raises DataError like `document_parts`."""
        return ("".join(parts) for parts in self.document_parts(start))
