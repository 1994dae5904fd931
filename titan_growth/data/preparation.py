"""Preparing a corpus: tokenize it once, split it, and keep the tokens as memory-mapped shards in the cache.

The folder is named after a hash of everything that determines the result. A journal records up to which piece of which
document everything is on disk; a killed preparation resumes there and ends with the same bytes. `meta.json`, written
last, makes a folder valid.

BOS comes only before the real beginning of a document and EOS only after its real end: a model must not learn that
texts end where a split cut them. For the same reason the tokens are those of the whole document (`encoding`). Each
contiguous run of a document's pieces in one split is a "document" of that split's index, since what precedes it in the
stream does not precede it in the text; document_mask separates them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from titan_growth.data.account import log_table
from titan_growth.data.content import ContentHashes, Trust
from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.encoding import DocumentEncoder
from titan_growth.data.part_writer import PartWriter, Position
from titan_growth.data.prepared import (
    FORMAT_VERSION,
    META_NAME,
    DamagedError,
    PreparedCorpus,
    as_of_now,
    open_prepared,
    say_if_prepared_before,
)
from titan_growth.data.shard_writer import SplitWriter
from titan_growth.data.splitting import TRAIN, VALIDATION, SplitRule, split_rule
from titan_growth.data.storage import cache_root, exclusive, writing
from titan_growth.data.tokenizers import Tokenizer, TokenizerSpec, load_or_train, require_ends
from titan_growth.data.windows import ROUNDING_SCALE, SEGMENT_CHARS, Beginning, Window, batched, windows_of
from titan_growth.tools.cores import num_cores
from titan_growth.tools.errors import DataError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.logs import logger

_JOURNAL_NAME = "journal.json"
_BATCH_CHARS = 1 << 17
"""Of a batch, of which every core has more than one: together, memory for many is small."""
_BATCH_WINDOWS = 1024
_TRIES = 3
"""How often a corpus may turn out to be another one than remembered before its preparation begins."""


def prepare(
    corpus_spec: CorpusSpec,
    tokenizer: TokenizerSpec | Tokenizer,
    *,
    bos: bool,
    eos: bool,
    validation_fraction: float,
    cache_dir: Path | None = None,
    progress: bool = False,
    shard_tokens: int = 2**26,
    rehash: bool = False,
) -> PreparedCorpus:
    """The prepared corpus, from the cache or made now.

    tokenizer: the recipe's, or one already loaded (a separate validation corpus uses the training corpus's).
    bos, eos: put the tokenizer's BOS before and its EOS after each document; where they are one token, EOS only.
    validation_fraction: in [0, 0.5]; see `splitting`.
    cache_dir: None for the default; see `storage.cache_root`.
    progress: show a bar on stderr if that is a terminal.
    shard_tokens: tokens per shard file if made now; does not change the stream.
    rehash: read the corpus and what is prepared of it in full, trusting nothing that is remembered (`content`).

    One process does the work while others that want the same wait. Raises DataError for whatever is wrong with the
    corpus, the tokenizer or the cache.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive, not {shard_tokens}")
    root = cache_root(cache_dir)
    hashes = ContentHashes(root, Trust.NOTHING if rehash else Trust.REMEMBERED)
    settings = {"bos": bos, "eos": eos, "validation_fraction": validation_fraction}
    for _ in range(_TRIES):
        corpus = open_corpus(corpus_spec)
        rule = split_rule(validation_fraction, corpus.num_bytes)
        content = corpus.fingerprint(hashes)
        made_of = _tokenizer(tokenizer, corpus, root, bos=bos, eos=eos)
        facts = {"format_version": FORMAT_VERSION, "corpus": content, **_facts_of_tokens(made_of, settings)}
        folder = root / "prepared" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        if not rehash and (found := _open_or_none(folder, report_damage=False)):
            return as_of_now(found, corpus, corpus_spec)
        with exclusive(folder.with_suffix(".lock"), "preparing the corpus"):
            if found := _open_or_none(folder, report_damage=True, checksums=rehash):
                return as_of_now(found, corpus, corpus_spec)
            trusted, hashes = hashes.took_on_trust, hashes.renewed()
            if trusted and corpus.fingerprint(hashes) != content:
                continue  # known by what its files hold now
            say_if_prepared_before(folder, facts, corpus.describe())
            with writing(folder):
                _Job(corpus_spec, corpus, made_of, folder, facts, rule, hashes, shard_tokens, progress).run()
            if found := _open_or_none(folder, report_damage=True):
                return found
    raise DataError(f"prepared data {folder}: changed while it was being made. See that nothing cleans the cache")


def _tokenizer(wanted: TokenizerSpec | Tokenizer, corpus: Corpus, root: Path, *, bos: bool, eos: bool) -> Tokenizer:
    """The tokenizer, which has the special tokens that are asked for. Raises DataError."""
    tokenizer = load_or_train(wanted, corpus, root) if isinstance(wanted, TokenizerSpec) else wanted
    require_ends(tokenizer, bos=bos, eos=eos)
    return tokenizer


def _facts_of_tokens(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """What the tokens of a text depend on. Where BOS and EOS are one token, two of them between documents are one."""
    is_one_token = settings["bos"] and settings["eos"] and tokenizer.bos_id == tokenizer.eos_id
    return {
        "tokenizer": tokenizer.fingerprint(),
        **settings,
        "bos": settings["bos"] and not is_one_token,
        "allow_special_tokens": tokenizer.allows_special_tokens,
    }


def _open_or_none(folder: Path, report_damage: bool, checksums: bool = False) -> PreparedCorpus | None:
    try:
        return open_prepared(folder, checksums=checksums)
    except DamagedError as damage:
        if report_damage:
            logger.warning("prepared data %s is damaged (%s) and is made again", folder, damage)
        return None


@dataclass
class _Job:
    """One preparation, from the journal (if there is one) to meta.json."""

    corpus_spec: CorpusSpec
    corpus: Corpus
    tokenizer: Tokenizer
    folder: Path
    facts: dict[str, Any]
    rule: SplitRule
    hashes: ContentHashes
    shard_tokens: int
    progress: bool
    at: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.account = self.corpus.account()

    def run(self) -> None:
        """Do the work. Raises DataError, or OSError of the disk."""
        started = time.monotonic()
        writers = self._writers_from_journal() or self._fresh_writers()
        logger.info("preparing %s with tokenizer %s", self.corpus.describe(), self.tokenizer.name)
        if self.facts["eos"] and not self.facts["bos"] and self.tokenizer.bos_id == self.tokenizer.eos_id:
            once = "BOS and EOS are one token, so documents get it once, after their ends"
            logger.warning("tokenizer %s: %s", self.tokenizer.name, once)
        num_shards = sum(writer.num_complete_shards for writer in writers.values())
        try:
            with self._bar() as bar:
                parts_writer = PartWriter(writers, self._ends("bos"), self._ends("eos"), self.at, self.account)
                encoder = DocumentEncoder(self.tokenizer, num_cores() + 1)
                for parts in encoder.encode(self._batches()):
                    chars = self.at.chars
                    for part in parts:
                        parts_writer.write(part)
                    if bar is not None:
                        bar.update(self.at.chars - chars)
                    now_complete = sum(writer.num_complete_shards for writer in writers.values())
                    if now_complete > num_shards:
                        num_shards = now_complete
                        self._write_journal(writers)
            num_tokens = sum(writer.num_tokens for writer in writers.values())
            if num_tokens == 0:
                why = self.account.why_nothing()
                raise DataError(f"{self.corpus.describe()}: holds no text to train on{why}. Use another corpus")
            if open_corpus(self.corpus_spec).fingerprint(self.hashes.renewed()) != self.facts["corpus"]:
                # Should the files be put back, nothing may go on from tokens of what stood in their place.
                (self.folder / _JOURNAL_NAME).unlink(missing_ok=True)
                raise DataError(f"{self.corpus.describe()}: the corpus changed while it was prepared. Start again")
            self._commit({name: writer.finish() for name, writer in writers.items()})
        finally:
            for writer in writers.values():
                writer.close()
            if not (self.folder / META_NAME).exists() and not (self.folder / _JOURNAL_NAME).exists():
                shutil.rmtree(self.folder, ignore_errors=True)  # nothing to go on from
        logger.info("prepared %s tokens in %.1f s (%s)", f"{num_tokens:,}", time.monotonic() - started, self.folder)
        log_table(self.account.to_json())
        self.at.log_spellings(as_tokens=self.tokenizer.allows_special_tokens)

    def _batches(self) -> Iterator[list[Window]]:
        """The remaining windows, in batches."""
        at = Beginning(self.at.document, self.at.pieces_before_document, self.at.segments_of_document)
        documents = self.corpus.document_parts(at.document, self.account)
        windows = windows_of(documents, at, self.rule, self.tokenizer.special_texts, self._scale)
        return batched(windows, _BATCH_CHARS, _BATCH_WINDOWS)

    @property
    def _scale(self) -> int:
        return ROUNDING_SCALE if self.tokenizer.rounds_long_texts else 1

    def _ends(self, what: str) -> list[int]:
        """The token that begins or ends documents, if one is wanted."""
        token = self.tokenizer.bos_id if what == "bos" else self.tokenizer.eos_id
        return [token] if self.facts[what] and token is not None else []

    def _fresh_writers(self) -> dict[str, SplitWriter]:
        # Unlink files of an older attempt, never rewrite them: another run may have them mapped.
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return {name: self._writer(name, None) for name in self._split_names}

    def _writers_from_journal(self) -> dict[str, SplitWriter] | None:
        """The writers of the journal, whose position is taken; None if there is no usable journal."""
        if (self.folder / META_NAME).exists():
            return None  # finished, and then damaged
        try:
            journal = json.loads((self.folder / _JOURNAL_NAME).read_bytes())
            if any(journal[key] != value for key, value in self._settings.items()):
                return None
            writers = {name: self._writer(name, journal["splits"][name]) for name in self._split_names}
            at = Position(**journal["position"])
            self.account.restore(journal["account"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("the interrupted preparation in %s cannot be continued (%s)", self.folder, error)
            return None
        self.at = at
        logger.info("continuing an interrupted preparation at document %d", self.at.document)
        return writers

    @property
    def _settings(self) -> dict[str, Any]:
        """What a position counts by: a preparation with others starts again."""
        segment_chars = SEGMENT_CHARS * self._scale
        return {"shard_tokens": self.shard_tokens, "rule": repr(self.rule), "segment_chars": segment_chars}

    def _write_journal(self, writers: dict[str, SplitWriter]) -> None:
        journal = {
            **self._settings,
            "splits": {name: writer.state() for name, writer in writers.items()},
            "position": asdict(self.at),
            "account": self.account.state(),
        }
        write_atomic(self.folder / _JOURNAL_NAME, json.dumps(journal).encode())

    def _commit(self, splits: dict[str, dict[str, Any]]) -> None:
        """Write the tokenizer's files and, last, meta.json, which does not depend on when or how often we ran."""
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()  # of a process that died in write_atomic
        tokenizer_files = []
        for name, content in self.tokenizer.files().items():
            write_atomic(self.folder / name, content)
            tokenizer_files.append({"file": name, "size_bytes": len(content), "crc32": zlib.crc32(content)})
        meta = {
            **self.facts,
            "corpus": {"fingerprint": self.facts["corpus"], "description": self.corpus.describe()},
            "tokenizer": {
                "fingerprint": self.facts["tokenizer"],
                "vocab_size": self.tokenizer.vocab_size,
                "files": tokenizer_files,
            },
            "dtype": self._dtype,
            "account": self.account.to_json(),
            "special_tokens_in_text": {
                "num_documents": self.at.spelling_documents,
                "num_occurrences": self.at.spellings,
            },
            "splits": splits,
        }
        write_atomic(self.folder / META_NAME, json.dumps(meta, indent=1).encode())
        (self.folder / _JOURNAL_NAME).unlink(missing_ok=True)

    @property
    def _dtype(self) -> str:
        return "uint16" if self.tokenizer.vocab_size <= 2**16 else "uint32"

    @property
    def _split_names(self) -> tuple[str, ...]:
        return (TRAIN, VALIDATION) if self.rule.period else (TRAIN,)

    def _writer(self, name: str, state: dict[str, Any] | None) -> SplitWriter:
        return SplitWriter(self.folder, name, self._dtype, self.shard_tokens, state)

    def _bar(self) -> Any:
        if not (self.progress and sys.stderr.isatty()):
            return contextlib.nullcontext()
        from tqdm import tqdm

        return tqdm(total=self.corpus.num_bytes, initial=self.at.chars, unit="B", unit_scale=True, desc="preparing")
