"""Prepared corpora: the token files of a finished preparation, opened as memory maps.

A prepared folder has, for each split, shards of raw little-endian token ids (`train-00000.bin`, ...) and an index of
the token offsets of document starts (`train.idx`, uint64); the tokenizer's files; and `meta.json`, written last.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from titan_growth.data.account import BAD_ROWS, table, with_listing
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.splitting import TRAIN, VALIDATION
from titan_growth.data.tokenizers import Tokenizer, load_tokenizer
from titan_growth.tools.errors import DataError
from titan_growth.tools.logs import logger

FORMAT_VERSION = 2
"""2: tokens are those of whole documents, spelled special tokens are text, and the corpus has an account."""
META_NAME = "meta.json"


class DamagedError(Exception):
    """A prepared folder whose files do not match its meta.json; the message says which."""


class TokenSplit:
    """The token stream of one split, memory-mapped on first use in each process."""

    def __init__(self, name: str, folder: Path, facts: dict[str, Any], dtype: str) -> None:
        self.name = name
        self.num_tokens: int = facts["num_tokens"]
        self.num_documents: int = facts["num_documents"]
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_names: list[str] = [shard["file"] for shard in facts["shards"]]
        self._shard_ends = np.cumsum([shard["num_tokens"] for shard in facts["shards"]], dtype=np.int64)
        self._index_name: str = facts["index"]["file"]
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would copy the whole file to a worker process.
        return {**self.__dict__, "_maps": {}}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as an int64 array of shape (stop - start,). Raises IndexError outside the stream."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of the {self.num_tokens} of split {self.name}")
        tokens = np.empty(stop - start, dtype=np.int64)
        position = start
        shard = int(np.searchsorted(self._shard_ends, start, side="right"))
        while position < stop:
            shard_start = int(self._shard_ends[shard - 1]) if shard else 0
            end = min(stop, int(self._shard_ends[shard]))
            data = self._map(self._shard_names[shard], self._dtype)
            tokens[position - start : end - start] = data[position - shard_start : end - shard_start]
            position, shard = end, shard + 1
        return tokens

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The token offsets in [start, stop) at which a document starts, ascending, as an int64 array."""
        if not self.num_documents:
            return np.empty(0, dtype=np.int64)
        index = self._map(self._index_name, np.dtype("<u8"))
        low, high = np.searchsorted(index, np.array([start, stop], dtype=np.uint64))
        return index[low:high].astype(np.int64)

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        if name not in self._maps:
            try:
                self._maps[name] = np.memmap(self._folder / name, dtype=dtype, mode="r")
            except (OSError, ValueError) as error:
                raise DataError(
                    f"prepared data {self._folder / name}: cannot be opened any more ({error}). "
                    "It was removed or changed during the run; start again"
                ) from error
        return self._maps[name]


@dataclass(frozen=True)
class PreparedCorpus:
    """A finished preparation: its splits (`validation` is None if none was asked for) and its tokenizer."""

    folder: Path
    train: TokenSplit
    validation: TokenSplit | None
    tokenizer: Tokenizer
    description: str
    meta: dict[str, Any]


def open_prepared(folder: Path, *, checksums: bool = False) -> PreparedCorpus | None:
    """Open a prepared folder; None if it is not finished. Raises DamagedError if files do not match meta.json.

    checksums: compare them too, which reads every file.
    """
    try:
        meta = json.loads((folder / META_NAME).read_bytes())
        for facts in _file_facts(meta):
            size = (folder / facts["file"]).stat().st_size
            if size != facts["size_bytes"]:
                raise DamagedError(f"{facts['file']} has {size:,} bytes instead of {facts['size_bytes']:,}")
            if checksums and _crc32(folder / facts["file"]) != facts["crc32"]:
                raise DamagedError(f"{facts['file']} does not match its checksum")
        splits = {name: TokenSplit(name, folder, facts, meta["dtype"]) for name, facts in meta["splits"].items()}
        tokenizer = load_tokenizer(folder, allow_special_tokens=meta["allow_special_tokens"])
        if tokenizer.fingerprint() != meta["tokenizer"]["fingerprint"]:
            raise DamagedError("the copy of the tokenizer has changed")
        description = meta["corpus"]["description"]
        table(meta["account"])  # which every fresh run logs
        return PreparedCorpus(folder, splits[TRAIN], splits.get(VALIDATION), tokenizer, description, meta)
    except FileNotFoundError as error:
        if not (folder / META_NAME).exists():
            return None
        raise DamagedError(f"{Path(error.filename).name} is missing") from error
    except (ValueError, KeyError, TypeError, DataError) as error:
        raise DamagedError(f"meta.json or the tokenizer is unreadable ({error})") from error
    except OSError as error:
        raise DataError(f"prepared data {folder}: cannot be read ({error.strerror}). Check its permissions") from error


def as_of_now(found: PreparedCorpus, corpus: Corpus, spec: CorpusSpec) -> PreparedCorpus:
    """What was prepared before, with where the corpus lies now, and what beside it.

    None of it changes its tokens or the folder's name; nor does the limit of bad rows. Raises DataError beyond it.
    """
    account = with_listing(found.meta["account"], corpus.account())
    num_bad_rows = sum(entry["count"] for entry in account["left_out"] if entry["reason"] == BAD_ROWS)
    limit = spec.rules.max_bad_rows
    if limit is not None and num_bad_rows > limit:
        raise DataError(
            f"{corpus.describe()}: holds {num_bad_rows:,} rows without text, and data.max_bad_rows is {limit:,}. "
            "Repair them, or raise data.max_bad_rows"
        )
    return replace(found, description=corpus.describe(), meta={**found.meta, "account": account})


def say_if_prepared_before(folder: Path, facts: dict[str, Any], description: str) -> None:
    """Work that is done once more is not done in silence: the content is another, or was not known by then."""
    for path in sorted(folder.parent.glob(f"*/{META_NAME}")):
        if path.parent == folder:
            continue  # damaged, as has been said
        try:
            meta = json.loads(path.read_bytes())
            is_older = meta["format_version"] < FORMAT_VERSION
            kept = ("tokenizer", "eos", "validation_fraction", *(() if is_older else ("bos", "allow_special_tokens")))
            meta["tokenizer"] = meta["tokenizer"]["fingerprint"]
            is_same = meta["corpus"]["description"] == description and all(meta[key] == facts[key] for key in kept)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if is_same:
            reason = (
                "from other content, by other rules (data.text_key, data.on_bad_row), or by an earlier version that "
                "went by names, sizes and times"
            )
            if is_older:
                reason = (
                    "by an earlier version, whose tokens differ where it cut documents or a text spells special tokens"
                )
            logger.info("%s was prepared before %s (%s)", description, reason, path.parent)
            return


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _file_facts(meta: dict[str, Any]) -> list[dict[str, Any]]:
    facts = list(meta["tokenizer"]["files"])
    for split in meta["splits"].values():
        facts += [*split["shards"], split["index"]]
    return facts
