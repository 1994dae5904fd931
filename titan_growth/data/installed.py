"""Corpora that every machine has without a network: the text of the running Python and of the packages installed in it.

"stdlib" is the standard library, about 12 MB. "site_packages" is what is installed beside it, hundreds of MB next to
torch: enough that a small model sees no token twice. Its near-duplicates are left out, and so are the packages of
"site_packages_held_out", which are for validation: text of packages that a model has not seen at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from titan_growth.data.account import NEAR_DUPLICATES, UNREADABLE, Account
from titan_growth.data.content import ContentHashes, marked
from titan_growth.data.corpus import Corpus
from titan_growth.data.near_duplicates import NearDuplicates
from titan_growth.data.readers.documents import Document
from titan_growth.data.readers.files import TEXT
from titan_growth.tools.errors import DataError

_NOT_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_PACKAGE_SUFFIXES = frozenset({".py", ".md", ".rst"})
_NOT_PACKAGES = ("__editable__", "pip/")
"""How names begin of what tells of the environment and not of its packages: a checkout's path, the pip of a Python."""
_HELD_OUT_SHARE = 0.02
"""Of the bytes of all packages."""
_LARGEST_HELD_OUT_SHARE = 0.01
"""Of one package: a large one would make validation text all of one kind."""


class InstalledText(Corpus):
    """Files below one folder; each is a document. Unreadable ones and such as are not UTF-8 are left out by name.

    They are not the user's to mend.
    """

    dataset: ClassVar[str]
    """What recipes call it."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self._root = root
        self._sizes = {name: (root / name).stat().st_size for name in sorted(names) if (root / name).is_file()}

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def contents(self, hashes: ContentHashes) -> dict[str, str]:
        """The files that its text depends on, with their SHA-256."""
        names = self._names_read()
        contents = hashes.of(str(self._root), [marked(self._root / name, name) for name in names], skip_unreadable=True)
        return dict(zip(names, contents, strict=True))

    def fingerprint(self, hashes: ContentHashes) -> str:
        return digest(self.dataset, self.contents(hashes).items())

    def account(self) -> Account:
        account = Account()
        account.add_files(TEXT, self._sizes.values())
        return account

    def document_parts(self, start: int = 0, account: Account | None = None) -> Iterator[Document]:
        account = self.account() if account is None else account
        account.begin(TEXT, 0)
        return itertools.islice(((text,) for text in self._texts(account)), start, None)

    def _names_read(self) -> list[str]:
        """The files that its text depends on."""
        return list(self._sizes)

    def _texts(self, account: Account) -> Iterator[str]:
        return (text for _, text in self._readable(self._sizes, account))

    def _readable(self, names: Iterable[str], account: Account) -> Iterator[tuple[str, str]]:
        """Name and text of the files that can be read."""
        for name in names:
            try:
                text = (self._root / name).read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                account.leave_out(UNREADABLE, name)
            else:
                yield name, text


class StdlibCorpus(InstalledText):
    """The *.py files of the running Python's standard library, without its tests."""

    dataset = "stdlib"

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        found = (path.relative_to(root) for path in root.rglob("*.py"))
        super().__init__(root, (name.as_posix() for name in found if not _NOT_STDLIB_FOLDERS & {*name.parts[:-1]}))
        if not self._sizes:
            raise DataError(
                f"{root}: this Python has no standard library in source form. Set dataset_path to a corpus of your own"
            )

    def describe(self) -> str:
        version = platform.python_version()
        return f"standard library of Python {version} ({len(self._sizes)} files, {self.num_bytes / 1e6:.1f} MB)"


class SitePackagesCorpus(InstalledText):
    """The Python, Markdown and reStructuredText files of installed packages, without near-duplicates.

    What is held out is compared first, so that no copy of its text is trained on.
    """

    dataset = "site_packages"

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("purelib"))
        found = (path.relative_to(root) for path in root.rglob("*") if path.suffix in _PACKAGE_SUFFIXES)
        names = (name.as_posix() for name in found)
        super().__init__(root, (name for name in names if not name.startswith(_NOT_PACKAGES)))
        sizes: Counter[str] = Counter()
        for name, size in self._sizes.items():
            sizes[package_of(name)] += size
        held_out = held_out_of(sizes)
        num_bytes = sum(sizes[package] for package in held_out)
        if not 0 < num_bytes < sum(sizes.values()):
            raise DataError(
                f"{root}: of the packages there, none with text can be held out and leave others to train on. "
                'Use dataset = "stdlib", or set dataset_path to a corpus of your own'
            )
        self.held_out_packages = held_out
        self._all_sizes = self._sizes
        self._held_out_names = [name for name in self._sizes if package_of(name) in held_out]
        self._sizes = {name: size for name, size in self._sizes.items() if package_of(name) not in held_out}

    def describe(self) -> str:
        num_packages = len({package_of(name) for name in self._sizes})
        amount = f"{num_packages} packages, {len(self._sizes)} files, {self.num_bytes / 1e6:.1f} MB"
        return f"text of packages in {self._root} ({amount} with near-duplicates)"

    def _names_read(self) -> list[str]:
        return list(self._all_sizes)

    def _texts(self, account: Account) -> Iterator[str]:
        seen = NearDuplicates()
        for _ in self._new_texts(self._held_out_names, seen, Account()):
            pass
        return self._new_texts(self._sizes, seen, account)

    def _new_texts(self, names: Iterable[str], seen: NearDuplicates, account: Account) -> Iterator[str]:
        for name, text in self._readable(names, account):
            if seen.is_new(text):
                yield text
            else:
                account.leave_out(NEAR_DUPLICATES, name)


class HeldOutPackages(SitePackagesCorpus):
    """The packages that `SitePackagesCorpus` holds out, without near-duplicates among them."""

    dataset = "site_packages_held_out"

    def __init__(self) -> None:
        super().__init__()
        self._sizes = {name: self._all_sizes[name] for name in self._held_out_names}

    def _texts(self, account: Account) -> Iterator[str]:
        return self._new_texts(self._sizes, NearDuplicates(), account)


INSTALLED: dict[str, Callable[[], Corpus]] = {
    corpus.dataset: corpus for corpus in (StdlibCorpus, SitePackagesCorpus, HeldOutPackages)
}
"""By what recipes call them."""


def package_of(name: str) -> str:
    """The package, or the module, that a file belongs to."""
    return name.split("/")[0]


def held_out_of(sizes_bytes: dict[str, int]) -> frozenset[str]:
    """Small packages, by chance but the same on every machine that has them, until they are 2 % of the text."""
    total = sum(sizes_bytes.values())
    left = _HELD_OUT_SHARE * total
    small = [name for name, size in sizes_bytes.items() if size <= _LARGEST_HELD_OUT_SHARE * total]
    chosen = set()
    for name in sorted(small, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if left <= 0:
            break
        chosen.add(name)
        left -= sizes_bytes[name]
    return frozenset(chosen)


def digest(kind: str, facts: Iterable[object]) -> str:
    """A fingerprint of a corpus of some kind, from facts that JSON can hold."""
    return f"{kind}-{hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()}"
