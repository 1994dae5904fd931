"""Starting a new run from somebody's checkpoint: `checkpoint.initial_load_path`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titan_growth.checkpoint.folder import StepFolder, open_step
from titan_growth.checkpoint.history import GrowthEvent, Lineage, Progress
from titan_growth.checkpoint.loading import load, misfits
from titan_growth.checkpoint.reader import NamesOf, SafeReader
from titan_growth.checkpoint.search import damage_of
from titan_growth.config.schema.recipe import CheckpointConfig, Recipe
from titan_growth.growth.schedule import GrowthPlan
from titan_growth.interchange.folder import is_hugging_face
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module
from titan_growth.run.plan import RunPlan
from titan_growth.run.resume import check_same_growths
from titan_growth.run.vet import listing_problem
from titan_growth.tools.collectives import on_rank0
from titan_growth.tools.errors import CheckpointError
from titan_growth.tools.location import folder_at
from titan_growth.tools.logs import logger


def tied_names(tied: Mapping[str, str]) -> NamesOf | None:
    """Shows another model's weights as those of one with tied ones: each copy is read from its original.

    What is stored under a copy's own name, if anything, may be another tensor, and is left alone.
    """
    if not tied:
        return None

    def names_of(name: str) -> list[str]:
        shown = [] if any(copy in name for copy in tied) else [name]
        return shown + [name.replace(original, copy) for copy, original in tied.items() if original in name]

    return names_of


def initial_reader(path: Path, family: str, config: DecoderConfig) -> SafeReader:
    """A reader of what a run of a model starts from: a DCP folder, or a Hugging Face folder."""
    names_of = tied_names(config.tied)
    if is_hugging_face(path):
        return HuggingFaceReader(path, names_of, family=family, config=config)
    return SafeReader(path, names_of)


def initial_notes(reader: SafeReader, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is worth a line about weights that do fit: casts, and settings that they were not trained with.

    Args:
        tensors: of this rank.
    """
    stored = reader.tensor_entries()
    casts = {(stored[name].properties.dtype, tensor.dtype) for name, tensor in tensors.items()}
    lines = [f"weights stored as {there} are cast to {here}" for there, here in sorted(casts, key=str) if there != here]
    return lines + (reader.differences() if isinstance(reader, HuggingFaceReader) else [])


@dataclass(frozen=True)
class Initial:
    """What a new run starts from, and the counters and growths that it goes on with."""

    path: Path
    progress: Progress
    lineage: Lineage
    seconds: float = 0.0
    """Wall-clock of the run that it is from, when that run is gone on with."""

    def load(self, tensors: Mapping[str, Tensor], config: DecoderConfig, recipe: Recipe) -> None:
        """Fills this rank's tensors of the model, and says what is worth a line about it.

        Raises:
            CheckpointError: on every rank, when they are not there or do not fit.
        """
        model_only = recipe.checkpoint.initial_load_model_only
        reader = initial_reader(self.path, recipe.model.name, config)
        load(reader, tensors, casts=model_only)
        for line in initial_notes(reader, tensors):
            logger.warning("%s", line)
        logger.info("started from %s of %s", "the weights" if model_only else "all state", self.path)


def open_initial(section: CheckpointConfig, growth: GrowthPlan) -> Initial:
    """`checkpoint.initial_load_path`, read in full by all ranks together.

    Raises:
        CheckpointError: on every rank, when it is damaged, or cannot be gone on from with the recipe's growths.
    """
    initial = on_rank0(lambda: initial_state(section, checksums=False))
    folder = on_rank0(lambda: open_step(initial.path))
    if folder is not None and (damage := damage_of(folder)):
        raise folder.refused(damage)
    check_same_growths(initial.path, initial.lineage, growth)
    return initial


def initial_state(section: CheckpointConfig, *, checksums: bool) -> Initial:
    """What the recipe names to start from.

    With `initial_load_model_only` the counters start at zero and any DCP folder will do, also one of another program,
    and a Hugging Face folder, which is told by its files; otherwise it must be a committed checkpoint of ours.

    Raises:
        CheckpointError: when the folder cannot be used in that way.
    """
    assert section.initial_load_path is not None
    path = folder_at(section.initial_load_path)
    key = f"checkpoint.initial_load_path {path}"
    if not path.is_dir():
        raise CheckpointError(f"{key}: no such folder. Name a step-N folder")
    theirs = is_hugging_face(path)
    if section.initial_load_in_hf and not theirs:
        message = "is no Hugging Face folder, which checkpoint.initial_load_in_hf = true says. Leave that key out"
        raise CheckpointError(f"{key}: {message}")
    if theirs:
        if not section.initial_load_model_only:
            raise CheckpointError(f"{key}: holds only weights. Set checkpoint.initial_load_model_only = true")
        return Initial(path, Progress(), Lineage())
    if not (path / ".metadata").is_file():
        raise CheckpointError(f"{key}: is not a checkpoint (it has no .metadata). Name a step-N folder")
    folder = open_step(path)
    if folder is not None and (damage := folder.damage(checksums=checksums)):
        raise folder.refused(damage)
    if section.initial_load_model_only:
        return Initial(path, Progress(), Lineage(ancestors=_ancestors(folder)))
    return _whole_state(path, folder, key)


def _ancestors(folder: StepFolder | None) -> tuple[GrowthEvent, ...]:
    """The growths behind a checkpoint; none where it is another program's, or does not say."""
    if folder is None:
        return ()
    lineage = folder.lineage()
    return (*lineage.ancestors, *lineage.events)


def _whole_state(path: Path, folder: StepFolder | None, key: str) -> Initial:
    if folder is None:
        raise CheckpointError(
            f"{key}: has no manifest, so its counters are not known. Set checkpoint.initial_load_model_only = true"
        )
    if folder.manifest.model_only:
        raise CheckpointError(f"{key}: holds only weights. Set checkpoint.initial_load_model_only = true")
    return Initial(path, folder.manifest.progress, folder.lineage(), folder.manifest.seconds)


def check_initial(plan: RunPlan) -> None:
    """`checkpoint.initial_load_path` holds nothing that should not be read, and the run's first model.

    Raises:
        CheckpointError: when it does not. What is asked of all bytes is left to the ranks, which divide the reading.
    """
    initial = initial_state(plan.recipe.checkpoint, checksums=False)
    path, lineage = initial.path, initial.lineage
    if len(lineage.events) > len(plan.growth_plan.planned):
        raise CheckpointError(f"{path}: has more growths behind it than the recipe has stages")
    config = plan.growth_plan.config_after(len(lineage.events))
    with torch.device("meta"):
        model = family_module(plan.recipe.model.name).Decoder(config, plan.recipe.training.seq_len)
    reader = initial_reader(path, plan.recipe.model.name, config)
    wanted = model.to(getattr(torch, plan.recipe.training.dtype)).state_dict()
    wrong = misfits(reader, wanted, casts=plan.recipe.checkpoint.initial_load_model_only)
    if wrong:
        raise CheckpointError(f"checkpoint.initial_load_path: {wrong[0]}. Name a checkpoint of this model")
    if is_hugging_face(path):
        return  # its files hold no archives, and have been looked into
    folder = open_step(path)
    if folder is not None and (problem := listing_problem(folder)):
        raise folder.refused(problem)
    chunks = reader.chunks()
    reader.check_chunks(chunk for name in wanted for chunk in chunks.get(name, ()))
