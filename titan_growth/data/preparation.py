"""Preparing a corpus: tokenize it once, split it, and keep the tokens as memory-mapped shards in the cache.

The result's folder is named after a hash of everything that determines it, and valid once it has `meta.json`. A journal
says what is safely on disk; a preparation that was killed goes on from there and ends with the same bytes.

Where a document is cut between the splits: BOS comes only before the document's real beginning and EOS only after its
real end, since a model must not learn that texts end where the split happened to cut. Each contiguous run of a
document's pieces in one split is a "document" of its own in that split's index: the stream before it is other text,
which attention does not reach with document_mask.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from titan_growth.data.corpora import open_corpus
from titan_growth.data.corpus import Corpus, CorpusSpec
from titan_growth.data.prepared import FORMAT_VERSION, META_NAME, DamagedError, PreparedCorpus, open_prepared
from titan_growth.data.shard_writer import SplitWriter
from titan_growth.data.splitting import TRAIN, VALIDATION, Piece, SplitRule, cut, split_rule
from titan_growth.data.storage import cache_root, exclusive, writing
from titan_growth.data.tokenizers import Tokenizer, TokenizerSpec, load_or_train
from titan_growth.tools.errors import DataError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.logs import logger

_JOURNAL_NAME = "journal.json"
_BATCH_CHARS = 1 << 20
_BATCH_PIECES = 1024


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
) -> PreparedCorpus:
    """Return the prepared corpus, from the cache if it is there, else by making it.

    tokenizer: what the recipe says, or one that is already loaded (as for a separate validation corpus, which is
        prepared with the training corpus's tokenizer and validation_fraction = 0).
    bos, eos: put the tokenizer's BOS before and its EOS after each document.
    validation_fraction: in [0, 0.5]; see `splitting`.
    cache_dir: None for the default; see `storage.cache_root`.
    progress: show a bar on stderr while working, if that is a terminal.
    shard_tokens: tokens per shard file, of a corpus that is prepared now; it does not change the stream.

    Of processes that ask for the same at once one does the work and the others wait. Raises DataError for whatever is
    wrong with the corpus, the tokenizer or the cache.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive, not {shard_tokens}")
    root = cache_root(cache_dir)
    corpus = open_corpus(corpus_spec)
    rule = split_rule(validation_fraction, corpus.num_bytes)
    if isinstance(tokenizer, TokenizerSpec):
        tokenizer = load_or_train(tokenizer, corpus, root)
    for wanted, token, what in ((bos, tokenizer.bos_id, "BOS"), (eos, tokenizer.eos_id, "EOS")):
        if wanted and token is None:
            raise DataError(f"tokenizer {tokenizer.name}: it has no {what} token. Set data.{what.lower()} = false")
    facts = {
        "format_version": FORMAT_VERSION,
        "corpus": corpus.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
        "bos": bos,
        "eos": eos,
        "validation_fraction": validation_fraction,
    }
    folder = root / "prepared" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    found = _open_or_none(folder, report_damage=False)
    if found is None:
        with exclusive(folder.with_suffix(".lock"), "preparing the corpus"):
            found = _open_or_none(folder, report_damage=True)
            if found is None:
                job = _Job(corpus_spec, corpus, tokenizer, folder, facts, rule, shard_tokens, progress)
                with writing(folder):
                    job.run()
                found = _open_or_none(folder, report_damage=True)
    if found is None:
        raise DataError(f"prepared data {folder}: changed while it was being made. See that nothing cleans the cache")
    return found


def _open_or_none(folder: Path, report_damage: bool) -> PreparedCorpus | None:
    try:
        return open_prepared(folder)
    except DamagedError as damage:
        if report_damage:
            logger.warning("prepared data %s is damaged (%s) and is made again", folder, damage)
        return None


class _Job:
    """One preparation, from the journal (if there is one) to meta.json."""

    def __init__(
        self,
        corpus_spec: CorpusSpec,
        corpus: Corpus,
        tokenizer: Tokenizer,
        folder: Path,
        facts: dict[str, Any],
        rule: SplitRule,
        shard_tokens: int,
        progress: bool,
    ) -> None:
        self._corpus_spec = corpus_spec
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._folder = folder
        self._facts = facts
        self._rule = rule
        self._shard_tokens = shard_tokens
        self._progress = progress
        self._bos = [tokenizer.bos_id] if facts["bos"] and tokenizer.bos_id is not None else []
        self._eos = [tokenizer.eos_id] if facts["eos"] and tokenizer.eos_id is not None else []
        self._dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        # Where we are: number of the document, pieces of it done, pieces and documents done in all, and the split whose
        # run of this document's pieces is open.
        self._document = 0
        self._pieces_of_document = 0
        self._pieces = 0
        self._num_documents = 0
        self._run: str | None = None
        self._chars = 0

    def run(self) -> None:
        """Do the work. Raises DataError, and OSError where the disk refuses."""
        started = time.monotonic()
        writers = self._writers_from_journal() or self._fresh_writers()
        logger.info("preparing %s with tokenizer %s", self._corpus.describe(), self._tokenizer.name)
        num_shards = sum(writer.num_complete_shards for writer in writers.values())
        try:
            with self._bar() as bar:
                for batch in self._batches():
                    chars = self._chars
                    self._write(batch, writers)
                    bar.update(self._chars - chars)
                    now_complete = sum(writer.num_complete_shards for writer in writers.values())
                    if now_complete > num_shards:
                        num_shards = now_complete
                        self._write_journal(writers)
            num_tokens = sum(writer.num_tokens for writer in writers.values())
            if num_tokens == 0:
                raise DataError(f"{self._corpus.describe()}: holds no text to train on. Use another corpus")
            if open_corpus(self._corpus_spec).fingerprint() != self._facts["corpus"]:
                raise DataError(f"{self._corpus.describe()}: the corpus changed while it was prepared. Start again")
            self._commit({name: writer.finish() for name, writer in writers.items()})
        finally:
            for writer in writers.values():
                writer.close()
            if not (self._folder / META_NAME).exists() and not (self._folder / _JOURNAL_NAME).exists():
                shutil.rmtree(self._folder, ignore_errors=True)  # nothing to go on from
        logger.info(
            "prepared %s tokens of %s documents in %.1f s (%s)",
            f"{num_tokens:,}",
            f"{self._num_documents:,}",
            time.monotonic() - started,
            self._folder,
        )

    def _batches(self) -> Iterator[list[tuple[int, Piece]]]:
        """The pieces from here on, with their document's number, in batches of about a million characters."""
        batch: list[tuple[int, Piece]] = []
        num_chars = 0
        first, pieces_to_skip = self._document, self._pieces_of_document
        for number, parts in enumerate(self._corpus.document_parts(first), start=first):
            for piece in islice(cut(parts, self._rule.piece_chars), pieces_to_skip if number == first else 0, None):
                batch.append((number, piece))
                num_chars += len(piece.text)
                if num_chars >= _BATCH_CHARS or len(batch) >= _BATCH_PIECES:
                    yield batch
                    batch, num_chars = [], 0
        if batch:
            yield batch

    def _write(self, batch: list[tuple[int, Piece]], writers: dict[str, SplitWriter]) -> None:
        encoded = self._tokenizer.encode_batch([piece.text for _, piece in batch])
        for (number, piece), tokens in zip(batch, encoded, strict=True):
            if piece.begins_document:
                self._document, self._pieces_of_document, self._run = number, 0, None
                tokens = [*self._bos, *tokens]
            if piece.ends_document:
                tokens = [*tokens, *self._eos]
            split = self._rule.split_of(self._pieces)
            if self._run != split:
                self._run = None
            if tokens:
                if self._run is None:
                    writers[split].begin_document()
                    self._run = split
                writers[split].append(tokens)
            self._pieces += 1
            self._pieces_of_document += 1
            self._num_documents += piece.ends_document
            self._chars += len(piece.text)

    def _fresh_writers(self) -> dict[str, SplitWriter]:
        # Files of an older attempt are unlinked, never rewritten: another run may still have them mapped.
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        return {name: self._writer(name, None) for name in self._split_names}

    def _writers_from_journal(self) -> dict[str, SplitWriter] | None:
        """Writers and position as the journal has them, or None if there is no usable journal."""
        if (self._folder / META_NAME).exists():
            return None  # it was finished and then damaged
        try:
            journal = json.loads((self._folder / _JOURNAL_NAME).read_bytes())
            if (journal["shard_tokens"], journal["rule"]) != (self._shard_tokens, repr(self._rule)):
                return None
            writers = {name: self._writer(name, journal["splits"][name]) for name in self._split_names}
            position = journal["position"]
            self._document = position["document"]
            self._pieces_of_document = position["pieces_of_document"]
            self._pieces = position["pieces"]
            self._num_documents = position["num_documents"]
            self._run = position["run"]
            self._chars = position["chars"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("the interrupted preparation in %s cannot be continued (%s)", self._folder, error)
            return None
        logger.info("continuing an interrupted preparation at document %d", self._document)
        return writers

    def _write_journal(self, writers: dict[str, SplitWriter]) -> None:
        journal = {
            "shard_tokens": self._shard_tokens,
            "rule": repr(self._rule),
            "splits": {name: writer.state() for name, writer in writers.items()},
            "position": {
                "document": self._document,
                "pieces_of_document": self._pieces_of_document,
                "pieces": self._pieces,
                "num_documents": self._num_documents,
                "run": self._run,
                "chars": self._chars,
            },
        }
        write_atomic(self._folder / _JOURNAL_NAME, json.dumps(journal).encode())

    def _commit(self, splits: dict[str, dict[str, Any]]) -> None:
        """Write the tokenizer's files and, last, meta.json. Nothing in it depends on when or how often we ran."""
        for leftover in self._folder.glob(".*.tmp"):
            leftover.unlink()  # of a process that died while it put a file in place
        tokenizer_files = []
        for name, content in self._tokenizer.files().items():
            write_atomic(self._folder / name, content)
            tokenizer_files.append({"file": name, "size_bytes": len(content), "crc32": zlib.crc32(content)})
        meta = {
            **self._facts,
            "corpus": {"fingerprint": self._facts["corpus"], "description": self._corpus.describe()},
            "tokenizer": {
                "fingerprint": self._facts["tokenizer"],
                "vocab_size": self._tokenizer.vocab_size,
                "files": tokenizer_files,
            },
            "dtype": self._dtype,
            "num_source_documents": self._num_documents,
            "splits": splits,
        }
        write_atomic(self._folder / META_NAME, json.dumps(meta, indent=1).encode())
        (self._folder / _JOURNAL_NAME).unlink(missing_ok=True)

    @property
    def _split_names(self) -> tuple[str, ...]:
        return (TRAIN, VALIDATION) if self._rule.period else (TRAIN,)

    def _writer(self, name: str, state: dict[str, Any] | None) -> SplitWriter:
        return SplitWriter(self._folder, name, self._dtype, self._shard_tokens, state)

    def _bar(self) -> Any:
        from tqdm import tqdm

        shown = self._progress and sys.stderr.isatty()
        return tqdm(
            total=self._corpus.num_bytes,
            initial=self._chars,
            unit="B",
            unit_scale=True,
            desc="preparing",
            disable=not shown,
        )
