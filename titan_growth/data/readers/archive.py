"""Tar archives, webdataset shards among them, read as a stream from beginning to end.

A member is read as a file of its extension. Members whose names agree up to the first dot are one sample, as webdataset
has it, whose JSON describes its plain text, if it has some, and is read only if it has none.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from titan_growth.data.account import OTHER_MEMBERS, SECOND_TEXTS, Account
from titan_growth.data.readers.files import JSON, PARQUET, TAR, TEXT, kind_of
from titan_growth.data.readers.place import Place, UnusableError
from titan_growth.data.readers.utf8 import LONGEST_RECORD_BYTES, too_long

_LONGEST_HEADER_BYTES = 1 << 20
_EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_FIX = "Copy it or write it again"


class _Member(tarfile.TarInfo):
    """A member's header. The library takes a damaged one for the end of the archive; here it is an error."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Member:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _EXTENDED_HEADERS and found.size > _LONGEST_HEADER_BYTES:
            raise UnusableError(f"the archive is damaged (a header of {found.size:,} bytes)", _FIX)
        if found.size < 0:
            raise UnusableError("the archive is damaged (a negative size)", _FIX)
        return found

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> _Member:
        try:
            found = super().fromtarfile(tarfile)
        except _END:
            tarfile.has_end = True
            raise
        except _NOTHING_LEFT:
            if not getattr(tarfile, "has_end", False):  # the first header is read before the archive is made
                raise UnusableError("the archive is truncated (it has no end mark)", _FIX) from None
            raise
        except _DAMAGES as error:
            raise UnusableError(f"the archive is truncated or damaged ({error})", _FIX) from error
        tarfile.has_end = False
        return found


_END = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_NOTHING_LEFT = tarfile.EmptyHeaderError  # type: ignore[attr-defined]
_DAMAGES = (tarfile.HeaderError, tarfile.TarError)


@dataclass
class Member:
    """A member that holds documents, to be used up before the next."""

    kind: str
    suffix: str
    """Its last extension, which says whether it is compressed."""
    stream: io.BufferedReader


class Archive:
    """The members of an archive that hold text; the others are left out by name."""

    def __init__(self, stream: io.BufferedReader, place: Place, account: Account) -> None:
        self._stream = stream
        self._place = place
        self._account = account
        self._json: list[tuple[PurePosixPath, bytes]] = []
        """The JSON of a sample (name, content), held back until it is clear that no plain text comes."""
        self._sample_with_json = self._sample_with_text = ""

    def members(self) -> Iterator[Member]:
        """Raises UnusableError for a damaged or truncated archive."""
        # Zero blocks are skipped because archives may be concatenated.
        with tarfile.open(fileobj=self._stream, mode="r|", tarinfo=_Member, ignore_zeros=True) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                if not info.isdir():
                    yield from self._documents_of(archive, info)
        yield from self._held_back()

    def _documents_of(self, archive: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[Member]:
        """What of a member, and of a sample that it ends, is read."""
        name = PurePosixPath(info.name)
        kind = kind_of(name)
        if any(part.startswith(".") for part in name.parts if part not in (".", "..")):
            self._leave_out(OTHER_MEMBERS, name)  # a Mac puts such a file before each member, so it ends no sample
            return
        sample = str(name.parent / name.name.split(".", 1)[0])
        if sample != self._sample_with_json:
            yield from self._held_back()
        if kind in (None, PARQUET, TAR) or not info.isreg():
            self._leave_out(OTHER_MEMBERS, name)
        elif kind == JSON and ".json" in (suffix.lower() for suffix in name.suffixes[-2:]):
            yield from self._hold_back(archive, info, sample, name)
        else:
            if kind == TEXT:
                self._sample_with_text = sample
                self._drop_json()
            self._place.enter(info.name)
            yield Member(str(kind), name.suffix, _content(archive, info))

    def _hold_back(
        self, archive: tarfile.TarFile, info: tarfile.TarInfo, sample: str, name: PurePosixPath
    ) -> Iterator[Member]:
        self._place.enter(info.name)
        if sample == self._sample_with_text:
            self._leave_out(SECOND_TEXTS, name)
            return
        if info.size > LONGEST_RECORD_BYTES:
            raise too_long("a .json member")
        # Files such as part.0.json, part.1.json are one sample by their names; memory does not hold all of many.
        if sum(len(content) for _, content in self._json) + info.size > LONGEST_RECORD_BYTES:
            yield from self._held_back()
            self._place.enter(info.name)
        self._sample_with_json = sample
        self._json.append((name, _content(archive, info).read()))

    def _held_back(self) -> Iterator[Member]:
        """The JSON of a sample without plain text."""
        held, self._json = self._json, []
        for name, content in held:
            self._place.enter(str(name))
            yield Member(JSON, name.suffix, io.BufferedReader(cast(io.RawIOBase, io.BytesIO(content))))

    def _drop_json(self) -> None:
        for name, _ in self._json:
            self._leave_out(SECOND_TEXTS, name)
        self._json = []

    def _leave_out(self, reason: str, name: PurePosixPath) -> None:
        self._account.leave_out(reason, f"{self._place.name}: {name}")


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> io.BufferedReader:
    stream = archive.extractfile(info)
    assert stream is not None, "a regular member has content"
    return cast(io.BufferedReader, stream)
