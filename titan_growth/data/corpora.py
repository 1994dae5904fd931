"""Corpora of files, and opening the corpus that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from titan_growth.data import hub
from titan_growth.data.account import Account
from titan_growth.data.content import ContentHashes
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.installed import INSTALLED, digest
from titan_growth.data.listing import FoundFiles, find_files, find_remote_files
from titan_growth.data.readers.documents import Document, read_documents
from titan_growth.data.readers.files import KINDS, PARQUET, TEXT
from titan_growth.data.readers.place import reading
from titan_growth.data.readers.rows import Pass, ReadRules, Skip
from titan_growth.data.remote import Remote, place_of
from titan_growth.tools.errors import DataError
from titan_growth.tools.packages import missing_package


def open_corpus(spec: CorpusSpec) -> Corpus:
    """Open the corpus that the recipe names. Raises DataError if it is missing, unreadable or empty."""
    kind = spec.dataset if spec.dataset in KINDS else None
    if spec.dataset_path is None:
        if kind:
            raise DataError(f"dataset {kind!r}: needs files to read. Set dataset_path to a file, a folder or a glob")
        return INSTALLED[spec.dataset]() if spec.dataset in INSTALLED else hub.load_from_hub(spec)
    place = place_of(spec.key, spec.dataset_path)
    if isinstance(place, Remote):
        origin, found = str(place.url), find_remote_files(place, kind)
    else:
        with reading(place):
            is_saved = hub.is_saved_dataset({name for name in hub.SAVED_NAMES if (place / name).is_file()})
        if is_saved:
            return hub.load_saved(spec, place)
        origin, found = str(place), find_files(place, kind)
    if any(file.kind == PARQUET for file in found.files) and (problem := missing_package(spec.key, "pyarrow")):
        raise DataError(str(problem))
    return FileCorpus(origin, found, spec.rules)


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """The documents of files, ordered by relative name."""

    origin: str
    found: FoundFiles
    rules: ReadRules

    @property
    def num_bytes(self) -> int:
        return sum(file.approximate_text_bytes for file in self.found.files)

    def describe(self) -> str:
        megabytes = sum(file.size_bytes for file in self.found.files) / 1e6
        return f"{self.origin} ({len(self.found.files)} files, {megabytes:.1f} MB)"

    def fingerprint(self, hashes: ContentHashes) -> str:
        files = self.found.files
        # Plain text has no keys and no rows: other rules must not cost a second preparation.
        key: Any = None if all(file.kind == TEXT for file in files) else self.rules.text.text_key
        if key is not None and self.rules.max_bad_rows is not None:
            key = {"text_key": key, "on_bad_row": "skip"}
        contents = hashes.of(self._base, files)
        facts = [(file.name, file.kind, content) for file, content in zip(files, contents, strict=True)]
        return digest("files", [key, *facts])

    @property
    def _base(self) -> str:
        """What the names of the files are relative to."""
        first = self.found.files[0]
        where = str(first.path.url) if isinstance(first.path, Remote) else str(first.path.absolute())
        return where.removesuffix(first.name)

    def account(self) -> Account:
        return self.found.account()

    def document_parts(self, start: int = 0, account: Account | None = None) -> Iterator[Document]:
        this = Pass(self.rules, Skip(start), self.account() if account is None else account)
        number = 0
        for file in self.found.files:
            this.account.begin(file.kind, number)
            num_to_skip = this.skip.remaining
            for document in read_documents(file, this):
                yield document
                number += 1
            number += num_to_skip - this.skip.remaining
