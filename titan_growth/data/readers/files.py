"""The files of a corpus, and the kinds they are read as."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from titan_growth.data.remote import Remote

TEXT, JSON, CSV, TSV, PARQUET, TAR = "text", "json", "csv", "tsv", "parquet", "tar"
KINDS = (TEXT, JSON, CSV, TSV, PARQUET, TAR)
_KIND_OF_SUFFIX = {
    **dict.fromkeys((".txt", ".text", ".md", ".py"), TEXT),
    **dict.fromkeys((".json", ".jsonl", ".jsonlines", ".ndjson"), JSON),
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    **dict.fromkeys((".tar", ".tgz"), TAR),
}
KNOWN = ".txt .text .md .py .json .jsonl .csv .tsv .tar (also with .gz, .bz2, .xz or .zst) and .parquet"
"""For messages."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_MARKUP = (".html", ".htm", ".xhtml", ".shtml", ".xml", ".svg", ".rss", ".atom")
MARKUP_FIX = 'extract its text first (trafilatura and the like), or train on the markup with dataset = "text"'
_TYPICAL_COMPRESSION = 3  # of text; only progress bars and the size of validation pieces depend on it


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: where it is, its name relative to the corpus, and how to read it."""

    path: Path | Remote
    name: str
    kind: str
    size_bytes: int
    mark: str
    """Changes when the file does: inode and times, or the storage's ETag or the like (`remote`)."""
    is_versioned: bool = False
    """Whether the mark is a version that the storage gives, and no mere time."""

    @property
    def has_frame(self) -> bool:
        """Whether even without a text a whole file has bytes."""
        return self.kind in (PARQUET, TAR) or compression_of(self.path.suffix) is not None

    @property
    def approximate_text_bytes(self) -> int:
        """Size of the text in bytes, guessed for compressed files."""
        compressed = compression_of(self.path.suffix) or self.kind == PARQUET
        return self.size_bytes * (_TYPICAL_COMPRESSION if compressed else 1)


def compression_of(suffix: str) -> str | None:
    """`.gz`, `.bz2`, `.xz` or `.zst` for a file's last extension; None if it is not compressed."""
    suffix = {".tgz": ".gz"}.get(suffix.lower(), suffix.lower())
    return suffix if suffix in COMPRESSIONS else None


def kind_of(path: Path | Remote | PurePosixPath) -> str | None:
    """The kind of a file by its extension, None if unknown."""
    kind = _KIND_OF_SUFFIX.get(_suffix_of_content(path))
    return None if kind == PARQUET and compression_of(path.suffix) else kind


def is_markup(path: Path | Remote) -> bool:
    """Whether the extension says HTML or XML, which is not text to train on as it stands."""
    return _suffix_of_content(path) in _MARKUP


def _suffix_of_content(path: Path | Remote | PurePosixPath) -> str:
    """The last extension in lower case, without that of a compression."""
    suffixes = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return suffixes[-2] if suffixes[-1] in COMPRESSIONS else suffixes[-1]
