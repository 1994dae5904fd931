"""All files below a folder, each once, whatever the links.

A link that leads out of the tree is followed. One that leads back, or to what is in the tree already, would make
documents count without end, or twice, and is left out by name. Hidden entries (a .git folder) are left out, too.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

HIDDEN = "hidden"
NOT_REGULAR = "no regular files"
FOLDERS = "folders (a glob reads what is in those that it matches if /** ends it)"
DANGLING = "links to nothing"
LOOP = "links back to a folder that they lie in"
AGAIN = "links to what is in the corpus already"
_MOST_WAYS = 100
"""To one folder, that a recursive glob goes: links between many folders make more than can be counted."""


@dataclass(frozen=True)
class Candidate:
    """A file that may be read."""

    path: Path
    name: str
    """Relative to where the search began."""
    real_path: str
    is_linked: bool
    """Whether a link is on the way to it."""


class _Link(NamedTuple):
    name: str
    way: tuple[str, ...]
    """Real paths of the folder that it lies in, and of those of the links that led there."""


@dataclass
class Search:
    """What a search for files finds.

    Args:
        root: what names are relative to.
    """

    root: Path
    candidates: list[Candidate] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Reason and name."""
    followed: list[str] = field(default_factory=list)
    """Links out of the root."""
    _hidden_too: bool = False
    _often: bool = False
    """Whether a folder may be found on several ways."""
    _visited: Counter[str] = field(default_factory=Counter)
    """How often each folder has been read."""
    _links: list[_Link] = field(default_factory=list)
    """A heap, so that which of two links to one thing is followed depends on their names alone."""

    def walk(self) -> None:
        """Finds all files below the root. Raises OSError."""
        self._scan("", os.path.realpath(self.root), ())
        while self._links:
            self._follow(heappop(self._links))

    def walk_matching(self, pattern: Sequence[str]) -> None:
        """Finds the files below the root that the parts of a glob match, of which some are `**`. Raises OSError.

        The library's glob follows every link that leads back, again and again.
        """
        self._hidden_too = any(part.startswith(".") for part in pattern)
        self._often = True  # the pattern may match only one of the ways
        if os.path.isdir(self.root):
            self.walk()
        self.candidates = [one for one in self.candidates if _matches(one.name.split("/"), pattern)]
        self.left_out = [(reason, name) for reason, name in self.left_out if reason == LOOP]

    def take(self, paths: Iterable[Path]) -> None:
        """Takes these files, which a glob matches, instead."""
        real_root = os.path.realpath(self.root)
        for path in paths:
            name = path.relative_to(self.root).as_posix()
            if not os.path.exists(path):
                self.left_out.append((DANGLING, name))
            elif os.path.isfile(path):
                self._take_file(name, os.path.realpath(path), real_root)
            elif os.path.isdir(path):
                self.left_out.append((FOLDERS, name))
            else:
                self.left_out.append((NOT_REGULAR, name))

    def without_copies(self, is_wanted: Callable[[Candidate], bool]) -> list[Candidate]:
        """The candidates that are wanted, by name; linked ones only if no other is the same file."""
        wanted = sorted(filter(is_wanted, self.candidates), key=lambda one: (one.is_linked, one.name))
        if not (wanted and wanted[-1].is_linked):
            return wanted
        seen: set[str] = set()
        kept = []
        for one in wanted:
            if one.is_linked and one.real_path in seen:
                self.left_out.append((AGAIN, one.name))
            else:
                seen.add(one.real_path)
                kept.append(one)
        return sorted(kept, key=lambda one: one.name)

    def _scan(self, name: str, real_folder: str, way: tuple[str, ...]) -> None:
        """A folder without what its links lead to; `way` are the folders of the links that lead to it."""
        pending = [(name, real_folder)]
        while pending:
            name, real_folder = pending.pop()
            if real_folder in self._visited and not self._often:
                self.left_out.append((AGAIN, f"{name}/"))
                continue
            self._visited[real_folder] += 1
            if self._visited[real_folder] > _MOST_WAYS:
                raise OSError(
                    errno.ELOOP, f"links lead to one folder on over {_MOST_WAYS} ways; name a folder, no glob"
                )
            with os.scandir(self.root / name) as entries:
                for entry in entries:
                    entry_name, real_path = f"{name}/{entry.name}".lstrip("/"), f"{real_folder}/{entry.name}"
                    if entry.name.startswith(".") and not self._hidden_too:
                        is_folder = entry.is_dir(follow_symlinks=False)
                        self.left_out.append((HIDDEN, entry_name + "/" * is_folder))
                    elif entry.is_symlink():
                        heappush(self._links, _Link(entry_name, (*way, real_folder)))
                    elif entry.is_dir():
                        pending.append((entry_name, real_path))
                    elif entry.is_file():
                        self.candidates.append(Candidate(self.root / entry_name, entry_name, real_path, bool(way)))
                    else:
                        self.left_out.append((NOT_REGULAR, entry_name))

    def _follow(self, link: _Link) -> None:
        """What a link leads to, if that is new. Raises OSError."""
        name, path = link.name, self.root / link.name
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            self.left_out.append((DANGLING, name))
            return
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            self.left_out.append((LOOP, name))  # it leads to itself
            return
        real_path, real_root = os.path.realpath(path), os.path.realpath(self.root)
        if stat.S_ISREG(mode):
            self._take_file(name, real_path, real_root)
        elif not stat.S_ISDIR(mode):
            self.left_out.append((NOT_REGULAR, name))
        elif any(_is_within(folder, real_path) for folder in link.way):
            self.left_out.append((LOOP, name))
        elif real_path in self._visited and not self._often:
            self.left_out.append((AGAIN, name))
        else:
            if not _is_within(real_path, real_root):
                self.followed.append(name)
            self._scan(name, real_path, link.way)

    def _take_file(self, name: str, real_path: str, real_root: str) -> None:
        is_linked = real_path != os.path.join(real_root, name)
        if is_linked and not _is_within(real_path, real_root):
            self.followed.append(name)
        self.candidates.append(Candidate(self.root / name, name, real_path, is_linked))


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a file's path matches a glob: `**` stands for any folders, and no wildcard for a dot at the beginning."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    is_hidden = names[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (not is_hidden and _matches(names[1:], pattern))
    return not is_hidden and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
