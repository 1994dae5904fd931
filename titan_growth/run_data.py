"""The recipe's corpus, tokenizer and blocks: the one place where `[training]`, `[data]` and `[validation]` meet."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_growth.config.schema import Recipe
from titan_growth.data import BatchLoader, BlockDataset, CorpusSpec, PreparedCorpus, TokenizerSpec, TokenSplit, prepare
from titan_growth.mesh import Mesh
from titan_growth.tools.errors import DataError, Problem


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

    def changes_since(self, before: dict[str, Any], step_name: str) -> list[Problem]:
        """What a checkpoint's fingerprints say against going on with this data: at most one problem.

        The cursor and the random states of a run mean nothing on other tokens. Another tokenizer makes other tokens of
        the same corpus, so with it the corpus is not a second problem.
        """
        now = self.fingerprints()
        for part, key in (("tokenizer", "data.tokenizer"), ("corpus", "training.dataset")):
            if part in before and before[part] != now[part]:
                message = (
                    f"{step_name} was trained with another {part} ({before[part]}; the recipe's is {now[part]}). "
                    f"Its data was: {before.get('description', 'not known')}"
                )
                hint = "Use that again, or name another job.dump_folder to start a new run"
                return [Problem(key, message, hint)]
        return []

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

    def loader(self, recipe: Recipe, mesh: Mesh, cursor: int) -> BatchLoader:
        """This rank's global batches from a cursor on."""
        return BatchLoader(
            self.train_blocks(recipe),
            global_batch_size=recipe.training.global_batch_size,
            local_batch_size=recipe.training.local_batch_size,
            dp_rank=mesh.dp_rank,
            dp_degree=mesh.shape.dp_degree,
            cursor=cursor,
            **recipe.training.dataloader.model_dump(),
        )

    def validation_blocks(self, recipe: Recipe) -> BlockDataset | None:
        """The validation samples, or None when nothing is held out, or less than one sequence."""
        seq_len = recipe.validation.seq_len or recipe.training.seq_len
        if self.validation is None or self.validation.num_tokens <= seq_len:
            return None  # `check_run_data` has refused this for a run that validates
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
