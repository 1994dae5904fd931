"""Corpora of files, and opening the corpus that a recipe names.

The default corpus, "stdlib", is the source of the running Python's standard library: about 12 MB of real text on every
machine, without a network.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from titan_growth.data import hub
from titan_growth.data.content import ContentHashes, mark_of, marked
from titan_growth.data.corpus import STDLIB, Corpus, CorpusSpec
from titan_growth.data.readers import (
    KINDS,
    PARQUET,
    TEXT,
    Document,
    Skip,
    SourceFile,
    kind_of,
    read_documents,
    reading,
)
from titan_growth.data.remote import Remote, list_remote, place_of
from titan_growth.tools.errors import DataError
from titan_growth.tools.logs import logger
from titan_growth.tools.packages import missing_package

_NOT_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def open_corpus(spec: CorpusSpec) -> Corpus:
    """Open the corpus that the recipe names. Raises DataError if it is missing, unreadable or empty."""
    kind = spec.dataset if spec.dataset in KINDS else None
    if spec.dataset_path is None:
        if kind:
            raise DataError(f"dataset {kind!r}: needs files to read. Set dataset_path to a file, a folder or a glob")
        return StdlibCorpus() if spec.dataset == STDLIB else hub.load_from_hub(spec)
    place = place_of(spec.key, spec.dataset_path)
    if isinstance(place, Remote):
        origin, files = str(place.url), find_remote_files(place, kind)
    else:
        with reading(place):
            is_saved = hub.is_saved_dataset({name for name in hub.SAVED_NAMES if (place / name).is_file()})
        if is_saved:
            return hub.load_saved(spec, place)
        origin, files = str(place), find_files(place, kind)
    if any(file.kind == PARQUET for file in files) and (problem := missing_package(spec.key, "pyarrow")):
        raise DataError(str(problem))
    return FileCorpus(origin, files, spec.text_key)


def find_files(path: Path, forced_kind: str | None) -> list[SourceFile]:
    """The usable files at `path` (a file, folder or glob), sorted by relative name.

    A forced kind overrides the extensions of a file or a glob; of a folder it selects the files of that kind.
    Raises DataError if there are none.
    """
    with reading(path):
        is_folder, exists = path.is_dir(), path.exists()
        if is_folder:
            base, candidates = path, _walk(path)
        elif exists:
            base, candidates = path.parent, [path]
        else:
            base = Path(_fixed_part(path))
            candidates = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
    if not candidates and not is_folder:
        what = "the glob matches no file" if glob.has_magic(str(path)) else "does not exist"
        raise DataError(f"{path}: {what}. Set dataset_path to a file, a folder or a glob that exists")
    files = []
    for candidate in candidates:
        kind = _kind(candidate, forced_kind, is_folder)
        if kind is not None:
            with reading(candidate):
                status = candidate.stat()
            name = candidate.relative_to(base).as_posix()
            files.append(SourceFile(candidate, name, kind, status.st_size, mark_of(status)))
    return _usable(path, files, len(candidates) - len(files))


def find_remote_files(place: Remote, forced_kind: str | None) -> list[SourceFile]:
    """Like `find_files`, in storage. Raises DataError."""
    with reading(place):
        listing = list_remote(place)
    is_folder, entries = listing.is_folder, listing.entries
    if is_folder and hub.is_saved_dataset({entry.name for entry in entries}):
        raise DataError(f"{place}: a saved dataset is read from a disk only. Copy it to one, or write it as parquet")
    if not entries and not is_folder:
        what = "the glob matches no file" if glob.has_magic(place.url.path) else "does not exist"
        raise DataError(f"{place}: {what}. Name a file, a folder or a glob that exists")
    files = []
    for entry in entries:
        kind = _kind(entry.path, forced_kind, is_folder)
        if kind is not None:
            files.append(SourceFile(entry.path, entry.name, kind, entry.size_bytes, entry.mark, entry.is_versioned))
    return _usable(place, files, len(entries) - len(files))


def _kind(candidate: Path | Remote, forced_kind: str | None, is_folder: bool) -> str | None:
    """The kind to read a file as, or None to skip it."""
    if forced_kind and not is_folder:
        return forced_kind
    kind = kind_of(candidate)
    return kind if forced_kind in (None, kind) else None


def _usable(path: Path | Remote, files: list[SourceFile], num_skipped: int) -> list[SourceFile]:
    """The files in order. Raises DataError when there is nothing to read."""
    if not files:
        raise DataError(
            f"{path}: no file of a known kind ({num_skipped} others). Known are .txt .text .md .py .json .jsonl (also "
            "with .gz, .bz2, .xz or .zst) and .parquet. "
            'With dataset = "text", "json" or "parquet" a file or a glob is read as such'
        )
    if num_skipped:
        logger.warning("%s: skipped %d files of other kinds", path, num_skipped)
    if sum(file.size_bytes for file in files) == 0:
        raise DataError(f"{path}: empty (0 bytes in {len(files)} files). Set dataset_path to a corpus with text")
    return sorted(files, key=lambda file: file.name)


def _walk(folder: Path) -> list[Path]:
    """All files below a folder, without hidden ones (such as a .git folder)."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return found


def _fixed_part(pattern: Path) -> str:
    """The leading folders of a glob that have no wildcards."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1])
    return os.path.join("", *parts)


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """The documents of files, ordered by relative name."""

    origin: str
    files: list[SourceFile]
    text_key: str

    @property
    def num_bytes(self) -> int:
        return sum(file.approximate_text_bytes for file in self.files)

    def describe(self) -> str:
        megabytes = sum(file.size_bytes for file in self.files) / 1e6
        return f"{self.origin} ({len(self.files)} files, {megabytes:.1f} MB)"

    def fingerprint(self, hashes: ContentHashes) -> str:
        # Plain text has no keys: another text_key must not cost a second preparation.
        key = None if all(file.kind == TEXT for file in self.files) else self.text_key
        contents = hashes.of(self._base, self.files)
        facts = [(file.name, file.kind, content) for file, content in zip(self.files, contents, strict=True)]
        return _digest("files", [key, *facts])

    @property
    def _base(self) -> str:
        """What the names of the files are relative to."""
        first = self.files[0]
        where = str(first.path.url) if isinstance(first.path, Remote) else str(first.path.absolute())
        return where.removesuffix(first.name)

    def document_parts(self, start: int = 0) -> Iterator[Document]:
        skip = Skip(start)
        for file in self.files:
            yield from read_documents(file, self.text_key, skip)


class StdlibCorpus(Corpus):
    """The *.py files of the running Python's standard library, without its tests; one file is one document.

    Files that are unreadable or not UTF-8 are skipped with one log line; they are not the user's to fix.
    """

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        found = (path.relative_to(root) for path in root.rglob("*.py"))
        names = sorted(name.as_posix() for name in found if not _NOT_STDLIB_FOLDERS.intersection(name.parts[:-1]))
        self._root = root
        self._sizes = {name: (root / name).stat().st_size for name in names if (root / name).is_file()}
        if not self._sizes:
            raise DataError(
                f"{root}: this Python has no standard library in source form. Set dataset_path to a corpus of your own"
            )

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def describe(self) -> str:
        version = platform.python_version()
        return f"standard library of Python {version} ({len(self._sizes)} files, {self.num_bytes / 1e6:.1f} MB)"

    def fingerprint(self, hashes: ContentHashes) -> str:
        files = [marked(self._root / name, name) for name in self._sizes]
        contents = hashes.of(str(self._root), files, skip_unreadable=True)
        return _digest(STDLIB, zip(self._sizes, contents, strict=True))

    def document_parts(self, start: int = 0) -> Iterator[Document]:
        return itertools.islice(self._texts(), start, None)

    def _texts(self) -> Iterator[Document]:
        num_skipped = 0
        for name in self._sizes:
            try:
                text = (self._root / name).read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                num_skipped += 1
                continue
            yield (text,)
        if num_skipped:
            logger.warning("standard library: skipped %d files that are unreadable or not UTF-8", num_skipped)


def _digest(kind: str, facts: Iterable[object]) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()}"
