"""Corpora and tokenizers by URL, in any storage that fsspec knows.

Text is streamed from storage, and its tokens go into the local cache: training never touches storage. An ETag or the
like tells versions of one object apart, and times do so less surely; neither is compared between objects (`content`).
fsspec caches listings, so caches are dropped first.

Every message about a place in storage begins with the recipe's key and the URL, which is how a `Remote` prints.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from titan_growth.data.storage import exclusive, writing
from titan_growth.data.streams import buffered, whole
from titan_growth.tools.errors import DataError, LocationError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.location import location
from titan_growth.tools.logs import logger

if TYPE_CHECKING:
    from upath import UPath

_VERSIONS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "Content-MD5", "Digest", "blob_id", "generation")
"""Names that storages give to a version or a hash of the content; the first one present counts."""
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "created", "ino")
"""Where there is no version: all that are present count."""


@dataclass(frozen=True)
class Remote:
    """A file or folder in storage, and the recipe's key that names it."""

    key: str
    url: UPath

    def __str__(self) -> str:
        return f"{self.key}: {self.url}"

    @property
    def suffix(self) -> str:
        """As a path's."""
        return self.url.suffix

    @property
    def suffixes(self) -> list[str]:
        """As a path's."""
        return self.url.suffixes

    def open(self) -> io.BufferedReader:
        """The file from beginning to end, read ahead a block at a time."""
        return buffered(whole(self.open_seekable()))

    def open_seekable(self) -> BinaryIO:
        """The file for random access. Raises what the storage's package raises."""
        return cast(BinaryIO, self.url.fs.open(self.url.path, "rb"))

    def info(self) -> dict[str, Any] | None:
        """The storage's facts about it now, None if it does not exist. Raises what the storage's package raises."""
        self.url.fs.invalidate_cache()
        try:
            return cast("dict[str, Any]", self.url.fs.info(self.url.path))
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class RemoteEntry:
    """A file of a listing."""

    path: Remote
    name: str
    """Relative to what was listed."""
    size_bytes: int
    mark: str
    """Changes when the file does, as far as the storage can tell; empty if it cannot."""
    is_versioned: bool
    """Whether the mark is a version, and no mere time."""


class Listing(NamedTuple):
    """What is at a place."""

    is_folder: bool
    entries: list[RemoteEntry]
    hidden: list[str]
    """Names of files that are left out because they, or a folder on the way, begin with a dot."""
    folders: list[str]
    """Names of folders that a glob matches."""


def list_remote(place: Remote) -> Listing:
    """The files at a place: the file itself, all below a folder, or what a glob matches.

    Hidden files and folders are left out. Raises DataError for a file of unknown size, and what the storage's package
    raises.
    """
    from upath import UPath

    fs, info = place.url.fs, place.info()
    path = fs._strip_protocol(place.url.path).rstrip("/")
    if info is not None and info["type"] != "directory":
        return Listing(False, _marked([_entry(place, path.rsplit("/", 1)[-1], info)]), [], [])
    if info is not None:
        base, found, hidden_too = path, fs.find(path, detail=True), False
    else:
        base = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), path.split("/")[:-1]))
        found = fs.glob(path, detail=True) if glob.has_magic(path) else {}
        hidden_too = "/." in path[len(base) :]
    entries, hidden, folders = [], [], []
    for where, facts in found.items():
        name = where[len(base) :].lstrip("/")
        # A name that ends with a slash is the empty object with which some tools mark a folder.
        if facts["type"] == "directory" or where.endswith("/"):
            if facts["type"] == "directory" and info is None and "**" not in path:
                folders.append(name)
            continue
        if not hidden_too and any(part.startswith(".") for part in name.split("/")):
            hidden.append(name)
            continue
        url = UPath(fs.unstrip_protocol(where))
        entries.append(_entry(Remote(place.key, url), name, facts))
    return Listing(info is not None, _marked(entries), hidden, folders)


def _marked(entries: list[RemoteEntry]) -> list[RemoteEntry]:
    """The entries, with a warning where one has no mark."""
    unmarked = [entry for entry in entries if not entry.mark]
    if unmarked:
        logger.warning(
            "%s: the storage gives no ETag or time, so only a change of size is noticed at once; any other at the next "
            "preparation, or by check --rehash",
            unmarked[0].path,
        )
    return entries


def _entry(place: Remote, name: str, info: dict[str, Any]) -> RemoteEntry:
    if info.get("size") is None:
        raise DataError(f"{place}: the storage does not say how large it is. Copy it to a disk or another storage")
    version = next((str(info[key]).strip('"') for key in _VERSIONS if info.get(key)), "")
    is_versioned = bool(version) and not version.startswith("W/")  # which HTTP calls a weak one
    times = " ".join(f"{key} {info[key]}" for key in _TIMES if info.get(key))
    return RemoteEntry(place, name, info["size"], version or times, is_versioned)


def fetch(place: Remote, names: Sequence[str], companions: Sequence[str], cache: Path) -> Path:
    """The cached copy of a file, made with the companions beside it, again when one has changed.

    place: the file, or a folder with one of the `names`; the first one present is taken.

    Raises DataError if there is no such file or the cache cannot be written, and what the storage's package raises.
    """
    info = place.info()
    if info is None:
        raise DataError(f"{place}: does not exist. Check the URL")
    is_folder = info["type"] == "directory"
    folder = place.url if is_folder else place.url.parent
    candidates = (_look(place, folder, name) for name in (names if is_folder else [place.url.name]))
    main = next((entry for entry in candidates if entry is not None), None)
    if main is None:
        raise DataError(f"{place}: the folder holds no {' or '.join(names[:2])}. Name a folder or a file that has one")
    entries = [entry for name in companions if (entry := _look(place, folder, name))] + [main]
    # A file without a version is fetched to see whether it has changed: tokenizers are small.
    fetched = {entry.name: _content(entry) for entry in entries if not entry.is_versioned}
    marks = {name: hashlib.sha256(content).hexdigest() for name, content in fetched.items()}
    facts = [str(folder), *((entry.name, entry.size_bytes, marks.get(entry.name, entry.mark)) for entry in entries)]
    copies = cache / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    if not (copies / main.name).is_file():
        with exclusive(copies.with_suffix(".lock"), f"fetching {place.url}"):
            if not (copies / main.name).is_file():
                contents = {
                    entry.name: fetched[entry.name] if entry.name in fetched else _content(entry) for entry in entries
                }
                with writing(copies):
                    copies.mkdir(exist_ok=True)
                    for name, content in contents.items():  # the main one, last, marks the copy complete
                        write_atomic(copies / name, content)
                logger.info("fetched %s", main.path.url)
    return copies / main.name


def _look(place: Remote, folder: UPath, name: str) -> RemoteEntry | None:
    file = Remote(place.key, folder / name)
    info = file.info()
    return _entry(file, name, info) if info is not None and info["type"] != "directory" else None


def _content(entry: RemoteEntry) -> bytes:
    with entry.path.open() as stream:
        return stream.read()


def place_of(key: str, text: str) -> Path | Remote:
    """The place that the value `text` of a recipe key names. Raises DataError for a URL that cannot be used."""
    try:
        where = location(text)
    except LocationError as error:
        raise DataError(f"{key}: {error}") from error
    return where if isinstance(where, Path) else Remote(key, where)
