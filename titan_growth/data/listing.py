"""Which files a corpus has: those at a path or URL that can be read, and by name and reason those that are left out."""

from __future__ import annotations

import glob
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from titan_growth.data.account import Account
from titan_growth.data.content import mark_of
from titan_growth.data.hub import is_saved_dataset
from titan_growth.data.readers.files import KNOWN, MARKUP_FIX, TEXT, SourceFile, is_markup, kind_of
from titan_growth.data.readers.place import reading
from titan_growth.data.remote import Remote, list_remote
from titan_growth.data.walk import FOLDERS, HIDDEN, Search
from titan_growth.tools.errors import DataError
from titan_growth.tools.text import some

OTHER_KINDS = "of no known kind"
MARKUP = f"HTML or XML ({MARKUP_FIX})"
EMPTY = "empty, as no whole file of its kind is (0 bytes)"
CARDS = 'dataset cards (dataset = "text", or a glob that names them, reads them)'
_CARD_NAMES = frozenset(
    f"{stem}{suffix}"
    for stems, suffixes in (
        (("readme", "license", "citation"), (".md", ".txt")),
        (("dataset_info", "dataset_infos", "dataset_dict", "state", "croissant"), (".json",)),
    )
    for stem in stems
    for suffix in suffixes
)
"""What the downloads and libraries of dataset hubs leave beside the data."""


@dataclass
class FoundFiles:
    """The files to read, ordered by relative name, and what is left out."""

    files: list[SourceFile] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Reason and name."""
    followed: list[str] = field(default_factory=list)
    """Links that lead out of the corpus."""

    def account(self) -> Account:
        """An account of these files, none of them read so far."""
        account = Account()
        for file in self.files:
            account.add_files(file.kind, [file.size_bytes])
        for reason, name in sorted(self.left_out):
            account.leave_out(reason, name)
        for name in sorted(self.followed):
            account.follow(name)
        return account


def find_files(path: Path, forced_kind: str | None) -> FoundFiles:
    """The usable files at `path` (a file, folder or glob), sorted by relative name.

    A forced kind overrides the extensions of a file or a glob; of a folder it selects the files of that kind.
    Raises DataError if there are none.
    """
    with reading(path):
        is_folder, exists = path.is_dir(), path.exists()
        search = Search(path if is_folder else path.parent if exists else Path(_fixed_part(path)))
        if is_folder:
            search.walk()
        elif not exists and "**" in path.parts:
            search.walk_matching(path.parts[len(search.root.parts) :])
        else:
            search.take([path] if exists else map(Path, glob.glob(str(path))))
        if not (is_folder or search.candidates):
            what = "the glob matches no file" if glob.has_magic(str(path)) else "does not exist"
            what += f" ({_reasons(FoundFiles(left_out=search.left_out))})" if search.left_out else ""
            what = "no regular file" if search.left_out and exists else what
            raise DataError(f"{path}: {what}. Set dataset_path to a file, a folder or a glob that exists")
        choice = _Choice(forced_kind, is_folder)
        chosen = search.without_copies(lambda one: choice.wants(one.path, one.name))
        if exists and not is_folder:
            search.followed.clear()  # who names a link means what it leads to
    found = FoundFiles(followed=search.followed)
    for one in chosen:
        with reading(one.path):
            status = one.path.stat()
        found.files.append(SourceFile(one.path, one.name, choice.kinds[one.name], status.st_size, mark_of(status)))
    found.left_out = search.left_out
    return _usable(path, found, choice)


def find_remote_files(place: Remote, forced_kind: str | None) -> FoundFiles:
    """Like `find_files`, in storage. Raises DataError."""
    with reading(place):
        listing = list_remote(place)
    is_folder, entries = listing.is_folder, listing.entries
    if is_folder and is_saved_dataset({entry.name for entry in entries}):
        raise DataError(f"{place}: a saved dataset is read from a disk only. Copy it to one, or write it as parquet")
    if not entries and not is_folder:
        what = "the glob matches no file" if glob.has_magic(place.url.path) else "does not exist"
        what += f" ({FOLDERS}: {some(listing.folders)})" if listing.folders else ""
        raise DataError(f"{place}: {what}. Name a file, a folder or a glob that exists")
    choice = _Choice(forced_kind, is_folder)
    found = FoundFiles()
    for entry in sorted(entries, key=lambda entry: entry.name):
        if choice.wants(entry.path, entry.name):
            facts = (entry.path, entry.name, choice.kinds[entry.name], entry.size_bytes, entry.mark)
            found.files.append(SourceFile(*facts, entry.is_versioned))
    found.left_out = [(HIDDEN, name) for name in listing.hidden] + [(FOLDERS, name) for name in listing.folders]
    return _usable(place, found, choice)


class _Choice:
    """Which files are read, and as what."""

    def __init__(self, forced_kind: str | None, is_folder: bool) -> None:
        self._forced_kind = forced_kind
        self._is_folder = is_folder
        self.kinds: dict[str, str] = {}
        """Of the wanted files, by name."""
        self.left_out: list[tuple[str, str]] = []

    def wants(self, path: Path | Remote, name: str) -> bool:
        """Whether to read a file; if not, it is left out with the reason."""
        kind = kind_of(path)
        if self._forced_kind and not self._is_folder:
            kind = self._forced_kind
        elif kind is None:
            self.left_out.append((MARKUP if is_markup(path) else OTHER_KINDS, name))
            return False
        elif self._forced_kind not in (None, kind):
            self.left_out.append((f'not of the kind "{self._forced_kind}"', name))
            return False
        self.kinds[name] = kind
        return True

    def without_cards(self, files: list[SourceFile]) -> list[SourceFile]:
        """The files without the cards of a dataset that lie beside its data, unless someone asks for them."""
        named = {file.name: file.kind for file in files if os.path.basename(file.name).lower() in _CARD_NAMES}
        has_records = any(file.kind != TEXT and file.name not in named for file in files)
        cards = {name for name, kind in named.items() if self._is_folder and (has_records or kind != TEXT)}
        self.left_out += [(CARDS, name) for name in sorted(cards)]
        return [file for file in files if file.name not in cards]


def _usable(path: Path | Remote, found: FoundFiles, choice: _Choice) -> FoundFiles:
    """What was found, without cards. Raises DataError when there is nothing to read."""
    found.files = choice.without_cards(found.files)
    found.left_out += choice.left_out
    if not found.files:
        raise DataError(
            f"{path}: no file of a known kind ({_reasons(found)}). Known are {KNOWN}. "
            'With dataset = "text", "json", "csv", "tsv", "tar" or "parquet" a file or a glob is read as such'
        )
    # What a download that failed leaves behind.
    found.left_out += [(EMPTY, file.name) for file in found.files if not file.size_bytes and file.has_frame]
    if sum(file.size_bytes for file in found.files) == 0:
        raise DataError(f"{path}: empty (0 bytes in {len(found.files)} files). Set dataset_path to a corpus with text")
    return found


def _reasons(found: FoundFiles) -> str:
    """What was left out, for a message."""
    by_reason = itertools.groupby(sorted(found.left_out), key=lambda entry: entry[0])
    return (
        "; ".join(f"{reason}: {some([name for _, name in entries])}" for reason, entries in by_reason)
        or "nothing is there"
    )


def _fixed_part(pattern: Path) -> str:
    """The leading folders of a glob that have no wildcards."""
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1])
    return os.path.join("", *parts)
