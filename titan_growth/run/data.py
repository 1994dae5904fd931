"""The recipe's corpus, tokenizer and blocks: the one place where `[training]`, `[data]` and `[validation]` meet.

torchtitan's debug recipes train on "c4_test", a tiny corpus that lies beside its source code, with a tokenizer that
lies there too. They are meant to run without any preparation, so where those files are missing something that every
machine has stands in for them, with a warning (`with_stand_ins`). No other corpus is ever replaced.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_growth.checkpoint.history import Progress
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.loader import with_values
from titan_growth.config.schema.data import DataConfig
from titan_growth.config.schema.recipe import Recipe
from titan_growth.data.account import log_table
from titan_growth.data.blocks import BlockDataset
from titan_growth.data.content import ContentHashes, Trust
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.loader import BatchLoader
from titan_growth.data.preparation import prepare
from titan_growth.data.prepared import PreparedCorpus, TokenSplit
from titan_growth.data.storage import cache_root
from titan_growth.data.tokenizer_training import require_vocab_size
from titan_growth.data.tokenizers import TokenizerSpec, load_named, require_ends
from titan_growth.layout.mesh import Mesh
from titan_growth.models.registry import vocab_size_of
from titan_growth.run.inputs import input_hashes
from titan_growth.tools.errors import DataError
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import is_remote, local_path
from titan_growth.tools.logs import logger

C4_TEST = "c4_test"
C4_TEST_PATH = "tests/assets/c4_test"
"""Where torchtitan keeps it, relative to the folder that its runs are started in."""


@dataclass(frozen=True)
class RunData:
    """Prepared data of a run."""

    corpus: PreparedCorpus
    validation: TokenSplit | None
    """What is validated on: another corpus, or the held-out part of the training corpus."""
    others: dict[str, str] = field(default_factory=dict)
    """Fingerprints of a validation corpus of its own, and of what else the run reads (`inputs`)."""
    validation_account: dict[str, Any] | None = None
    """Of a validation corpus of its own: what it is made of, and what was left out (`Account.to_json`)."""

    @property
    def account(self) -> dict[str, Any]:
        """What the training corpus is made of, and what was left out."""
        account: dict[str, Any] = self.corpus.meta["account"]
        return account

    def log_accounts(self) -> None:
        """Logs what the run trains and validates on, as tables."""
        log_table(self.account, "training data")
        if self.validation_account is not None:
            log_table(self.validation_account, "validation data")

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint remembers, by content: moving or copying the files changes nothing."""
        return {
            "corpus": _tokens(self.corpus),
            "tokenizer": self.corpus.meta["tokenizer"]["fingerprint"][:16],
            "description": self.corpus.description,
            **self.others,
        }

    def loader(self, recipe: Recipe, mesh: Mesh, progress: Progress, base_seq_len: int) -> BatchLoader:
        """This rank's global batches from the next step on, in the seed's order.

        progress: its cursor counts blocks of `base_seq_len`.
        """
        training, data, seed = recipe.training, recipe.data, recipe.debug.seed
        assert seed is not None, "the seed has not been resolved"
        batches, next_step = BatchSizes.of(training), progress.step + 1
        return BatchLoader(
            BlockDataset(self.corpus.train, training.seq_len, data.document_mask, seed, data.shuffle, base_seq_len),
            global_batch_size=batches.size(next_step),
            size_of=lambda number: batches.size(next_step + number),
            local_batch_size=training.local_batch_size,
            dp_rank=mesh.dp_rank,
            dp_degree=mesh.shape.dp_degree,
            cursor=progress.samples,
            **training.dataloader.model_dump(),
        )

    def validation_blocks(self, recipe: Recipe) -> BlockDataset | None:
        """The validation samples, or None when nothing is held out, or less than one sequence."""
        seq_len = recipe.validation.seq_len or recipe.training.seq_len
        if self.validation is None or self.validation.num_tokens <= seq_len:
            return None  # `prepare_run_data` has refused this for a run that validates
        return BlockDataset(self.validation, seq_len, recipe.data.document_mask, seed=0, shuffle=False)


def _tokens(corpus: PreparedCorpus) -> str:
    """Fingerprint of the tokens of a prepared corpus, whatever files they came from."""
    return hashlib.sha256(json.dumps(corpus.meta["splits"], sort_keys=True).encode()).hexdigest()[:16]


def prepare_run_data(recipe: Recipe, vocab_size: int, *, progress: bool, rehash: bool = False) -> RunData:
    """Prepares (or finds prepared) what the recipe trains and validates on.

    Args:
        progress: this process speaks for all: it shows a bar on a terminal, and warns of what stands in for what.
        rehash: read every file that identifies the data, whatever the cache remembers of it.

    Raises:
        DataError: for anything wrong with corpus, tokenizer or cache, or a split too small for one sequence.
    """
    found = Findings()
    recipe = with_stand_ins(recipe, found)
    for warning in found.warnings if progress else []:
        logger.warning("%s", warning)
    data, training, validation = recipe.data, recipe.training, recipe.validation
    cache_dir = local_path(data.cache_dir) if data.cache_dir else None
    settings: dict[str, Any] = {
        "bos": data.bos,
        "eos": data.eos,
        "cache_dir": cache_dir,
        "progress": progress,
        "rehash": rehash,
    }
    rows = {name: getattr(data, name) for name in ("text_key", "split", "subset", "on_bad_row", "max_bad_rows")}
    corpus = prepare(
        CorpusSpec(training.dataset, training.dataset_path, **rows),
        _tokenizer_spec(data, recipe.model.hf_assets_path, vocab_size),
        validation_fraction=data.validation_fraction,
        **settings,
    )
    held_out, others, account = corpus.validation, {}, None
    if validation.enable and (validation.dataset is not None or validation.dataset_path is not None):
        other = CorpusSpec(
            validation.dataset or training.dataset,
            validation.dataset_path,
            key="validation.dataset_path",
            **rows,
        )
        separate = prepare(other, corpus.tokenizer, validation_fraction=0.0, **settings)
        held_out, account = separate.train, separate.meta["account"]
        others = {"validation": _tokens(separate), "validation_description": separate.description}
    longest = max([training.seq_len, *(planned.seq_len or 0 for planned in recipe.growth.active_stages)])
    _require_sequence(corpus.train, longest)
    if validation.enable and held_out is not None:
        try:
            _require_sequence(held_out, validation.seq_len or training.seq_len)
        except DataError as error:
            raise DataError(
                f"validation: {error}; or raise data.validation_fraction, or set validation.dataset_path"
            ) from None
    hashes = ContentHashes(cache_root(cache_dir), Trust.NOTHING if rehash else Trust.REMEMBERED)
    return RunData(corpus, held_out, {**others, **input_hashes(recipe, hashes)}, account)


def _tokenizer_spec(data: DataConfig, assets: str | None, vocab_size: int) -> TokenizerSpec:
    return TokenizerSpec(data.tokenizer, data.tokenizer_path, assets, vocab_size, data.allow_special_tokens)


def planned_tokenizer(recipe: Recipe) -> list[str]:
    """What a plan says of the tokenizer, which it loads if it needs neither corpus nor network; nothing of a usual one.

    The run may happen on another machine, so files that are not here are no problem.

    Raises:
        DataError: for what a run would be refused for.
    """
    vocab_size = vocab_size_of(recipe.model)
    spec = _tokenizer_spec(recipe.data, recipe.model.hf_assets_path, vocab_size)
    if spec.source is not None and is_remote(spec.source):
        return [f"tokenizer: {spec.source} is not looked at"]
    if spec.source is not None and not local_path(spec.source).exists():
        return [f"tokenizer: {spec.source} is not here, and not looked at"]
    tokenizer = load_named(spec, None)
    if tokenizer is None:
        require_vocab_size(vocab_size)
        return []
    require_ends(tokenizer, bos=recipe.data.bos, eos=recipe.data.eos)
    ends = f"BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}"
    return [f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens, {ends}"] if spec.source is not None else []


def _require_sequence(split: TokenSplit, seq_len: int) -> None:
    """Raises DataError when a split is shorter than one sequence."""
    BlockDataset(split, seq_len, document_mask=False, seed=0, shuffle=False)


def with_stand_ins(recipe: Recipe, found: Findings) -> Recipe:
    """The recipe with something in place of c4_test's files where they are missing, with warnings that say so.

    Raises:
        DataError: when the recipe validates and leaves nothing of what stands in for its corpus to validate on.
    """
    if recipe.training.dataset != C4_TEST:
        return recipe
    values: dict[str, Any] = {}
    is_here = Path(C4_TEST_PATH).exists()
    replaced = not is_here and _is_beside_torchtitan(recipe.training.dataset_path)
    if replaced:
        values |= {"training.dataset": "stdlib", "training.dataset_path": None}
    elif recipe.training.dataset_path is None:
        values["training.dataset_path"] = C4_TEST_PATH
    validation = recipe.validation
    if validation.enable and _is_beside_torchtitan(validation.dataset_path):
        if validation.dataset == C4_TEST and is_here:
            values["validation.dataset_path"] = C4_TEST_PATH
        elif validation.dataset in (C4_TEST, "c4_validation") and replaced:
            if not recipe.data.validation_fraction:
                message = "and data.validation_fraction = 0 holds nothing out of the corpus that stands in. Raise it"
                raise DataError(f"validation.dataset: '{validation.dataset}' is not here, {message}")
            values |= {"validation.dataset": None, "validation.dataset_path": None}
    if replaced:
        message = f"there is no {C4_TEST_PATH} here, so the corpus is the text of Python's own library"
        if "validation.dataset" in values:
            message += f", and a part of it is held out in place of '{validation.dataset}'"
        found.warn("training.dataset", message, "training.dataset_path names another one")
    assets, data = recipe.model.hf_assets_path, recipe.data
    trains_its_own = data.tokenizer_path is None and data.tokenizer in ("auto", "sentencepiece")
    if assets is not None and trains_its_own and not is_remote(assets) and not local_path(assets).exists():
        values["model.hf_assets_path"] = None
        message = f"{assets} does not exist, so a tokenizer is trained on the corpus"
        found.warn("model.hf_assets_path", message, "data.tokenizer_path names another one")
    return with_values(recipe, values)


def _is_beside_torchtitan(path: str | None) -> bool:
    """Whether a recipe means the files beside torchtitan's source code, and no files of its user's own."""
    return path is None or Path(path) == Path(C4_TEST_PATH)
