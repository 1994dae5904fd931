"""From text to batches: corpora, tokenizers, prepared shards, blocks and the loader.

A corpus (`corpora`) is tokenized once (`tokenizers`) into memory-mapped shards (`preparation`, opened by `prepared`).
The training loop then sees an endless, shuffled, randomly accessible sequence of fixed-length blocks (`blocks`), of
which a single integer, the cursor, says how far training has come (`loader`).

The names below are looked up on first use: importing this package imports neither torch nor a tokenizer library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_growth.data.blocks import BlockDataset
    from titan_growth.data.corpora import open_corpus
    from titan_growth.data.corpus import Corpus, CorpusSpec
    from titan_growth.data.loader import BatchLoader, ValidationBatches, batch_hash, sample_digests
    from titan_growth.data.preparation import prepare
    from titan_growth.data.prepared import PreparedCorpus, TokenSplit, check_tokenizer_matches
    from titan_growth.data.tokenizers import Tokenizer, TokenizerSpec, load_or_train, load_tokenizer

__all__ = [
    "BatchLoader",
    "BlockDataset",
    "Corpus",
    "CorpusSpec",
    "PreparedCorpus",
    "TokenSplit",
    "Tokenizer",
    "TokenizerSpec",
    "ValidationBatches",
    "batch_hash",
    "check_tokenizer_matches",
    "load_or_train",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "sample_digests",
]

_MODULES = {
    "blocks": ("BlockDataset",),
    "corpora": ("open_corpus",),
    "corpus": ("Corpus", "CorpusSpec"),
    "loader": ("BatchLoader", "ValidationBatches", "batch_hash", "sample_digests"),
    "preparation": ("prepare",),
    "prepared": ("PreparedCorpus", "TokenSplit", "check_tokenizer_matches"),
    "tokenizers": ("Tokenizer", "TokenizerSpec", "load_or_train", "load_tokenizer"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
