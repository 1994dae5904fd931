"""Corpora of files, and how to open any corpus that a recipe names (`corpus.py` says what a corpus is).

The default corpus, "stdlib", is the source text of the running Python's own standard library: about 12 MB of real
text that every machine has, without any network.
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
from pathlib import Path

from titan_growth.data import hub
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
    """Find the corpus that the recipe means. Raises DataError if it is missing, unreadable or empty."""
    if spec.dataset_path is not None:
        place = place_of(spec.key, spec.dataset_path)
        return _open_remote(spec, place) if isinstance(place, Remote) else _open_path(spec, place)
    if spec.dataset == STDLIB:
        return StdlibCorpus()
    if spec.dataset in KINDS:
        raise DataError(
            f"dataset {spec.dataset!r}: needs files to read. Set dataset_path to a file, a folder or a glob"
        )
    return hub.load_from_hub(spec)


def _open_path(spec: CorpusSpec, path: Path) -> Corpus:
    with reading(path):
        present = {name for name in ("state.json", "dataset_info.json", "dataset_dict.json") if (path / name).is_file()}
    is_saved_dataset = "dataset_dict.json" in present or present == {"state.json", "dataset_info.json"}
    if is_saved_dataset:
        return hub.load_saved(spec, path)
    return _of_files(spec, path, find_files(path, _forced_kind(spec)))


def _open_remote(spec: CorpusSpec, place: Remote) -> Corpus:
    return _of_files(spec, place.url, find_remote_files(place, _forced_kind(spec)))


def _of_files(spec: CorpusSpec, origin: object, files: list[SourceFile]) -> FileCorpus:
    if any(file.kind == PARQUET for file in files) and (problem := missing_package(spec.key, "pyarrow")):
        raise DataError(str(problem))
    return FileCorpus(str(origin), files, spec.text_key)


def _forced_kind(spec: CorpusSpec) -> str | None:
    return spec.dataset if spec.dataset in KINDS else None


def find_files(path: Path, forced_kind: str | None) -> list[SourceFile]:
    """The usable files at `path` (a file, folder or glob), sorted by relative name.

    A forced kind is applied to a file or a glob whatever the extensions; of a folder it selects the files of that kind.
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
            files.append(SourceFile(candidate, name, kind, status.st_size, status.st_mtime_ns))
    return _usable(path, files, len(candidates) - len(files))


def find_remote_files(place: Remote, forced_kind: str | None) -> list[SourceFile]:
    """Like `find_files`, in storage. Raises DataError."""
    with reading(place):
        listing = list_remote(place)
    is_folder, entries = listing.is_folder, listing.entries
    names = {entry.name for entry in entries}
    if is_folder and ("dataset_dict.json" in names or names >= {"state.json", "dataset_info.json"}):
        raise DataError(f"{place}: a saved dataset is read from a disk only. Copy it to one, or write it as parquet")
    if not entries and not is_folder:
        what = "the glob matches no file" if glob.has_magic(place.url.path) else "does not exist"
        raise DataError(f"{place}: {what}. Name a file, a folder or a glob that exists")
    files = []
    for entry in entries:
        kind = _kind(entry.place, forced_kind, is_folder)
        if kind is not None:
            files.append(SourceFile(entry.place, entry.name, kind, entry.size_bytes, entry.mark))
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
            f"{path}: no file of a known kind ({num_skipped} others). Known are .txt .text .md .py .json .jsonl "
            '(also with .gz or .zst) and .parquet; dataset = "text", "json" or "parquet" reads a file or a glob as such'
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
    """The leading folders of a glob that have no wildcard."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1])
    return os.path.join("", *parts)


class FileCorpus(Corpus):
    """The documents of files, in the order of the files' relative names."""

    def __init__(self, origin: str, files: list[SourceFile], text_key: str) -> None:
        self._origin = origin
        self._files = files
        self._text_key = text_key

    @property
    def num_bytes(self) -> int:
        return sum(file.approximate_text_bytes for file in self._files)

    def describe(self) -> str:
        megabytes = sum(file.size_bytes for file in self._files) / 1e6
        return f"{self._origin} ({len(self._files)} files, {megabytes:.1f} MB)"

    def fingerprint(self) -> str:
        # The text key plays no part in plain text, so naming another one must not cost a second preparation.
        key = None if all(file.kind == TEXT for file in self._files) else self._text_key
        facts = [(file.name, file.kind, file.size_bytes, file.mark) for file in self._files]
        return _digest("files", [key, *facts])

    def document_parts(self, start: int = 0) -> Iterator[Document]:
        skip = Skip(start)
        for file in self._files:
            yield from read_documents(file, self._text_key, skip)


class StdlibCorpus(Corpus):
    """The *.py files of the running Python's standard library, without its tests; one file is one document.

    Files that cannot be read or are not UTF-8 are left out with one log line: they are not the user's files.
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

    def fingerprint(self) -> str:
        # No modification times: they tell when Python was installed, and would differ between equal nodes.
        return _digest(STDLIB, [platform.python_version(), *self._sizes.items()])

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
