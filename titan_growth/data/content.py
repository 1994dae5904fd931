"""Which content a file has: the SHA-256 of its bytes, computed once and remembered.

Names, sizes and times do not tell corpora apart: archives, container images and Nix set all times alike, and shards are
cut to one size. So a corpus is known by the hashes of its files. A hash is remembered in the cache beside the file's
size and mark (what a listing says of it: inode and times, or a store's ETag), so the next start costs a look at each
file. Like git, it is not remembered of a file that changed so lately that another change could keep its times.

A file that changes under the same mark is noticed when it is next hashed whatever is remembered: before and after each
preparation (`Trust.VERSIONS`), and by `check --rehash` (`Trust.NOTHING`).
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from titan_growth.data.readers import reading
from titan_growth.data.remote import Remote
from titan_growth.data.storage import exclusive
from titan_growth.tools.errors import DataError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.logs import logger
from titan_growth.tools.sealed import SEAL, seal_of
from titan_growth.tools.text import gib, many, some

_FORMAT = 1
_FRESH_NS = 2 * 10**9
"""File systems keep times in steps of up to 2 s. Within one step, a second change leaves no trace."""
_CHUNK_BYTES = 1 << 20
_THREADS = min(8, os.cpu_count() or 1)
_SECONDS_BETWEEN_SAVES = 30.0
_WORTH_A_LINE_BYTES = 1 << 30
UNREADABLE = "unreadable"
"""In place of a hash, where a caller asks for that."""


class Trust(enum.Enum):
    """What need not be read again."""

    REMEMBERED = enum.auto()
    """Every file whose size and mark are those that its hash was remembered with."""
    VERSIONS = enum.auto()
    """Of those, only objects whose store gives a version (ETag, generation): times can be set, and repeat."""
    NOTHING = enum.auto()


class Markable(Protocol):
    """A file as a listing shows it."""

    @property
    def path(self) -> Path | Remote: ...
    @property
    def name(self) -> str:
        """Relative to the folder that all files of a listing share."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def mark(self) -> str:
        """Changes when the content does, as far as the file system or store can tell."""

    @property
    def is_versioned(self) -> bool:
        """Whether the mark is a version, and no mere time."""


@dataclass(frozen=True)
class MarkedFile:
    """A file on a disk, with its mark."""

    path: Path
    name: str
    size_bytes: int
    mark: str
    is_versioned: bool = False


def marked(path: Path, name: str) -> MarkedFile:
    """The file at a path. Raises OSError."""
    status = os.stat(path)
    return MarkedFile(path, name, status.st_size, mark_of(status))


def mark_of(status: os.stat_result) -> str:
    """The mark of a file on a disk. The ctime is in it because no program can set it."""
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


class ContentHashes:
    """The hashes of files, taken from the cache or computed.

    Several processes may ask for the same files: one reads them while the others wait.

    Args:
        root: the cache (`storage.cache_root`).
    """

    def __init__(self, root: Path, trust: Trust = Trust.REMEMBERED) -> None:
        self._root = root
        self._trust = trust
        self.took_on_trust = False
        """Whether any hash came from the cache for a file without a version."""

    def renewed(self) -> ContentHashes:
        """Hashes of what the files hold now, whatever is remembered."""
        return ContentHashes(self._root, Trust.VERSIONS if self._trust is Trust.REMEMBERED else self._trust)

    def of(self, base: str, files: Sequence[Markable], *, skip_unreadable: bool = False) -> list[str]:
        """SHA-256 (hex) of each file, in their order.

        Args:
            base: folder or URL that the files' names are relative to.
            skip_unreadable: a file that cannot be read has the hash `UNREADABLE`, which is not remembered.

        Raises:
            DataError: when a file cannot be read, or changes meanwhile.
        """
        table = _Table(self._root / "hashes", base)
        known = self._trusted(files, table.load())
        if len(known) < len(files):
            with table.locked():
                known = self._trusted(files, table.load())  # another process may have added some
                missing = [file for file in files if file.name not in known]
                known |= _compute(missing, table, skip_unreadable)
        return [known[file.name] for file in files]

    def _trusted(self, files: Sequence[Markable], entries: Mapping[str, _Entry]) -> dict[str, str]:
        """The remembered hashes that need no reading."""
        found = {}
        for file in files if self._trust is not Trust.NOTHING else ():
            entry = entries.get(file.name)
            if entry is not None and entry.is_of(file) and (file.is_versioned or self._trust is Trust.REMEMBERED):
                found[file.name] = entry.sha256
                self.took_on_trust = self.took_on_trust or not file.is_versioned
        return found


@dataclass(frozen=True)
class _Entry:
    """What is remembered of a file."""

    size_bytes: int
    mark: str
    sha256: str

    def is_of(self, file: Markable) -> bool:
        return (self.size_bytes, self.mark) == (file.size_bytes, file.mark)


class _Table:
    """The remembered hashes of the files below one place: a JSON file with a checksum of itself."""

    def __init__(self, folder: Path, base: str) -> None:
        self.base = base
        self._path = folder / f"{hashlib.sha256(base.encode(errors='surrogateescape')).hexdigest()[:32]}.json"
        self._can_write = self._is_changed = False
        self.entries: dict[str, _Entry] = {}

    def load(self) -> dict[str, _Entry]:
        """What is remembered. A table that is damaged counts for nothing, and is said to."""
        try:
            content = json.loads(self._path.read_bytes())
            if content.pop(SEAL) != seal_of(content) or (content["format"], content["base"]) != (_FORMAT, self.base):
                raise ValueError("it does not match its own checksum")
            self.entries = {name: _Entry(*entry) for name, entry in content["files"].items()}
        except FileNotFoundError:
            self.entries = {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("%s cannot be used (%s), so the files of %s are hashed again", self._path, error, self.base)
            self.entries = {}
        return self.entries

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the table, for others would compute the same. A cache that cannot be written is only warned about."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self._path.with_suffix(".lock"), f"hashing the files of {self.base}"))
                self._can_write = True
            except DataError as error:
                logger.warning("the hashes of the files of %s cannot be remembered: %s", self.base, error)
            yield

    def replace(self, name: str, entry: _Entry | None) -> _Entry | None:
        """Put an entry, or none, in place of what is remembered of a file; returns that."""
        before = self.entries.pop(name, None)
        if entry is not None:
            self.entries[name] = entry
        self._is_changed = self._is_changed or entry != before
        return before

    def save(self) -> None:
        """Write the entries if they have changed, as far as the cache can be written."""
        if not (self._can_write and self._is_changed):
            return
        files = {name: [entry.size_bytes, entry.mark, entry.sha256] for name, entry in self.entries.items()}
        content = {"format": _FORMAT, "base": self.base, "files": files}
        try:
            write_atomic(self._path, json.dumps({**content, SEAL: seal_of(content)}))  # compact: it has a line per file
            self._is_changed = False
        except OSError as error:
            self._can_write = False
            logger.warning("%s: cannot be written (%s), so its files are hashed again", self._path, error.strerror)


def _compute(files: Sequence[Markable], table: _Table, skip_unreadable: bool) -> dict[str, str]:
    """Hash files on threads, remembering each that can be. Raises DataError."""
    size = sum(file.size_bytes for file in files)
    if size >= _WORTH_A_LINE_BYTES:
        logger.info("reading %s (%s) of %s to know its content", many(len(files), "file"), gib(size), table.base)
    found: dict[str, str] = {}
    changed = []
    saved_at = time.monotonic()
    threads = ThreadPoolExecutor(_THREADS)
    try:
        jobs: dict[Future[_Hash], Markable] = {threads.submit(_hash, file): file for file in files}
        for job in as_completed(jobs):
            file = jobs[job]
            try:
                result = job.result()
            except DataError:
                if not skip_unreadable:
                    raise
                result = _Hash(UNREADABLE, can_be_remembered=False)
            found[file.name] = result.sha256
            entry = _Entry(file.size_bytes, file.mark, result.sha256)
            before = table.replace(file.name, entry if result.can_be_remembered else None)
            if before is not None and before.is_of(file) and before != entry:
                changed.append(file.name)
            if time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES:
                table.save()
                saved_at = time.monotonic()
    finally:
        threads.shutdown(cancel_futures=True)
        table.save()
    if changed:
        what = "other content than before under the same size and times"
        logger.warning("%s: %s: %s", table.base, what, some(sorted(changed)))
    return found


@dataclass(frozen=True)
class _Hash:
    sha256: str
    can_be_remembered: bool


def _hash(file: Markable) -> _Hash:
    """The hash of a file, read once in bounded memory. Raises DataError."""
    with reading(file.path):
        if isinstance(file.path, Remote):
            with file.path.open() as stream:
                digest = _digest(stream, file)
            return _Hash(digest, can_be_remembered=True)
        with open(file.path, "rb", buffering=0) as raw:
            before, now = os.fstat(raw.fileno()), time.time_ns()
            digest = _digest(raw, file)
            after = os.fstat(raw.fileno())
    if before.st_mtime_ns != after.st_mtime_ns:
        raise _changed(file)
    is_fresh = before.st_ctime_ns > now - _FRESH_NS or abs(now - before.st_mtime_ns) < _FRESH_NS
    return _Hash(digest, can_be_remembered=not is_fresh and file.mark == mark_of(before) == mark_of(after))


def _digest(stream: Any, file: Markable) -> str:
    digest, num_bytes = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := stream.readinto(buffer):
        digest.update(buffer[:count])
        num_bytes += count
    if num_bytes != file.size_bytes:
        raise _changed(file)
    return digest.hexdigest()


def _changed(file: Markable) -> DataError:
    return DataError(f"{file.path}: it changed while it was read. Start again once the corpus no longer changes")
