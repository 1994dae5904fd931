"""The recipe's corpus, tokenizer and blocks: the one place where `[training]`, `[data]` and `[validation]` meet."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_growth.config.schema import Recipe
from titan_growth.data import BlockDataset, CorpusSpec, PreparedCorpus, TokenizerSpec, TokenSplit, prepare
from titan_growth.tools.errors import DataError


@dataclass(frozen=True)
class RunData:
    """Prepared data of a run."""

    corpus: PreparedCorpus
    validation: TokenSplit | None
    """What is validated on: another corpus, or the held-out part of the training corpus."""

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint remembers, by content: moving or copying the files changes nothing."""
        splits = json.dumps(self.corpus.meta["splits"], sort_keys=True).encode()
        return {
            "corpus": hashlib.sha256(splits).hexdigest()[:16],
            "tokenizer": self.corpus.tokenizer_fingerprint[:16],
            "description": self.corpus.description,
        }

    def train_blocks(self, recipe: Recipe) -> BlockDataset:
        """The training samples in the order that the seed fixes."""
        assert recipe.debug.seed is not None, "the seed has not been resolved"
        return BlockDataset(
            self.corpus.train,
            recipe.training.seq_len,
            recipe.data.document_mask,
            recipe.debug.seed,
            recipe.data.shuffle,
        )

    def validation_blocks(self, recipe: Recipe) -> BlockDataset | None:
        """The validation samples, or None when nothing is held out."""
        if self.validation is None:
            return None
        seq_len = recipe.validation.seq_len or recipe.training.seq_len
        return BlockDataset(self.validation, seq_len, recipe.data.document_mask, seed=0, shuffle=False)


def prepare_run_data(recipe: Recipe, vocab_size: int, *, progress: bool) -> RunData:
    """Prepares (or finds prepared) what the recipe trains and validates on.

    Raises:
        DataError: for anything wrong with corpus, tokenizer or cache, or a split too small for one sequence.
    """
    data, training, validation = recipe.data, recipe.training, recipe.validation
    cache_dir = Path(data.cache_dir).expanduser() if data.cache_dir else None
    settings: dict[str, Any] = {"bos": data.bos, "eos": data.eos, "cache_dir": cache_dir, "progress": progress}
    corpus = prepare(
        CorpusSpec(training.dataset, training.dataset_path, data.text_key, data.split, data.subset),
        TokenizerSpec(data.tokenizer, data.tokenizer_path, recipe.model.hf_assets_path, vocab_size),
        validation_fraction=data.validation_fraction,
        **settings,
    )
    held_out = corpus.validation
    if validation.dataset is not None or validation.dataset_path is not None:
        other = CorpusSpec(
            validation.dataset or training.dataset, validation.dataset_path, data.text_key, data.split, data.subset
        )
        held_out = prepare(other, corpus.tokenizer, validation_fraction=0.0, **settings).train
    return RunData(corpus, held_out)


def check_run_data(run_data: RunData, recipe: Recipe) -> None:
    """Raises DataError when a split that will be used is shorter than one sequence."""
    seq_len = recipe.training.seq_len
    BlockDataset(run_data.corpus.train, seq_len, False, 0, False)
    if recipe.validation.enable and run_data.validation is not None:
        try:
            BlockDataset(run_data.validation, recipe.validation.seq_len or seq_len, False, 0, False)
        except DataError as error:
            raise DataError(
                f"validation: {error}; or raise data.validation_fraction, or set validation.dataset_path"
            ) from None
