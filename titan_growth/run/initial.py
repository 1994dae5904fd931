"""Starting a new run from other weights: `checkpoint.initial_load_path`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from titan_growth.checkpoint.folder import open_step
from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.loading import load, misfits
from titan_growth.checkpoint.reader import NamesOf, SafeReader
from titan_growth.checkpoint.search import damage_of
from titan_growth.config.schema.recipe import CheckpointConfig, Recipe
from titan_growth.growth.schedule import GrowthPlan
from titan_growth.interchange.folder import is_hugging_face
from titan_growth.interchange.reader import HuggingFaceReader
from titan_growth.models.config import DecoderConfig
from titan_growth.models.parametrization import Factors
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.run.plan import RunPlan
from titan_growth.run.resume import check_same_growths
from titan_growth.run.vet import history_of, listing_problem, recipe_of
from titan_growth.tools.collectives import on_rank0
from titan_growth.tools.errors import CheckpointError
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import folder_at
from titan_growth.tools.logs import logger


def tied_names(tied: Mapping[str, str]) -> NamesOf | None:
    """Presents weights as those of a model with tied ones: each copy is read from its original.

    A tensor stored under a copy's own name may be another one, and is not read.
    """
    if not tied:
        return None

    def names_of(name: str) -> list[str]:
        shown = [] if any(copy in name for copy in tied) else [name]
        return shown + [name.replace(original, copy) for copy, original in tied.items() if original in name]

    return names_of


def initial_reader(path: Path, family: str, config: DecoderConfig) -> SafeReader:
    """A reader of a run's initial weights: a DCP folder, or a Hugging Face folder."""
    names_of = tied_names(config.tied)
    if is_hugging_face(path):
        return HuggingFaceReader(path, names_of, family=family, config=config)
    return SafeReader(path, names_of)


def initial_notes(reader: SafeReader, tensors: Mapping[str, Tensor], config: DecoderConfig) -> list[str]:
    """Warnings about weights that fit this rank's tensors: casts, what is left out, settings of their training.

    Args:
        config: of the model to load into.
    """
    stored = reader.tensor_entries()
    casts = {(stored[name].properties.dtype, tensor.dtype) for name, tensor in tensors.items()}
    lines = [f"weights stored as {there} are cast to {here}" for there, here in sorted(casts, key=str) if there != here]
    for copy, original in config.tied.items():
        if _is_stored_apart(reader, copy):
            lines.append(
                f"{copy} of {reader.folder.name} is left out: model.tie_word_embeddings = true takes {original} for it"
            )
    return lines + (reader.differences() if isinstance(reader, HuggingFaceReader) else [])


def _is_stored_apart(reader: SafeReader, copy: str) -> bool:
    """Whether a parameter, tied here, is one of its own in what is read."""
    if isinstance(reader, HuggingFaceReader):
        return copy not in reader.opened.config.tied
    folder = open_step(reader.folder)
    model = model_config_of(recipe_of(folder).model, Findings()) if folder is not None else None
    if model is not None and copy in model.tied:
        return False
    return copy in SafeReader(reader.folder).tensor_entries()


@dataclass(frozen=True)
class Initial:
    """What a new run starts from, and the counters and growths that it takes over."""

    path: Path
    progress: Progress
    lineage: Lineage
    seconds: float = 0.0
    """Wall-clock seconds of the run that is continued."""

    def load(self, tensors: Mapping[str, Tensor], config: DecoderConfig, recipe: Recipe) -> None:
        """Fills this rank's tensors of the model, with its warnings.

        Raises:
            CheckpointError: on every rank, when they are not there or do not fit.
        """
        model_only = recipe.checkpoint.initial_load_model_only
        reader = initial_reader(self.path, recipe.model.name, config)
        load(reader, tensors, casts=model_only)
        for line in initial_notes(reader, tensors, config):
            logger.warning("%s", line)
        logger.info("started from %s of %s", "the weights" if model_only else "all state", self.path)


def open_initial(section: CheckpointConfig, growth: GrowthPlan) -> Initial:
    """`checkpoint.initial_load_path`, read in full by all ranks together.

    Raises:
        CheckpointError: on every rank, when it is damaged, or its growths are not the recipe's.
    """
    initial = on_rank0(lambda: initial_state(section))
    folder = on_rank0(lambda: open_step(initial.path))
    if folder is not None and (damage := damage_of(folder)):
        raise folder.refused(damage)
    check_same_growths(initial.path, initial.lineage, growth)
    return initial


def initial_state(section: CheckpointConfig) -> Initial:
    """What the recipe names to start from; its checksums are not compared.

    With `initial_load_model_only` the counters start at zero, and any DCP folder or Hugging Face folder will do;
    without, only a committed checkpoint.

    Raises:
        CheckpointError: when the folder cannot be used in that way.
    """
    assert section.initial_load_path is not None
    path = folder_at(section.initial_load_path)
    key = f"checkpoint.initial_load_path {path}"
    if not path.is_dir():
        raise CheckpointError(f"{key}: no such folder. Name a step-N folder")
    only_weights = f"{key}: holds only weights. Set checkpoint.initial_load_model_only = true"
    if is_hugging_face(path):
        if not section.initial_load_model_only:
            raise CheckpointError(only_weights)
        return Initial(path, Progress(), Lineage())
    if section.initial_load_in_hf:
        message = "is no Hugging Face folder, which checkpoint.initial_load_in_hf = true says. Leave that key out"
        raise CheckpointError(f"{key}: {message}")
    if not (path / ".metadata").is_file():
        raise CheckpointError(f"{key}: is not a checkpoint (it has no .metadata). Name a step-N folder")
    folder = open_step(path)
    if folder is not None and (damage := folder.damage(checksums=False)):
        raise folder.refused(damage)
    if section.initial_load_model_only:
        lineage = folder.lineage() if folder is not None else Lineage()  # another program's has none
        return Initial(path, Progress(), Lineage(ancestors=(*lineage.ancestors, *lineage.events)))
    if folder is None:
        raise CheckpointError(
            f"{key}: has no manifest, so its counters are not known. Set checkpoint.initial_load_model_only = true"
        )
    if folder.manifest.model_only:
        raise CheckpointError(only_weights)
    lineage = folder.lineage()
    lineage = replace(lineage, parents=(*lineage.parents, str(path)))
    return Initial(path, folder.manifest.progress, lineage, folder.manifest.seconds)


def check_initial(plan: RunPlan) -> None:
    """Checks that `checkpoint.initial_load_path` holds the run's first model and nothing unsafe.

    Raises:
        CheckpointError: when it does not. The ranks read the shards in full, and divide that work.
    """
    initial = initial_state(plan.recipe.checkpoint)
    path, lineage = initial.path, initial.lineage
    if len(lineage.events) > len(plan.growth_plan.planned):
        raise CheckpointError(f"{path}: has more growths behind it than the recipe has stages")
    config = plan.growth_plan.chain.configs[len(lineage.events)]
    with torch.device("meta"):
        model = family_module(plan.recipe.model.name).Decoder(config, plan.recipe.training.seq_len)
    reader = initial_reader(path, plan.recipe.model.name, config)
    wanted = model.to(getattr(torch, plan.recipe.training.dtype)).state_dict()
    if wrong := misfits(reader, wanted, casts=plan.recipe.checkpoint.initial_load_model_only):
        raise CheckpointError(f"checkpoint.initial_load_path: {wrong[0]}. Name a checkpoint of this model")
    _require_same_factors(path, config)
    if is_hugging_face(path):
        return  # its files hold no archives, and have been checked
    folder = open_step(path)
    if folder is not None and (problem := listing_problem(folder)):
        raise folder.refused(problem)
    chunks = reader.chunks()
    reader.check_chunks(chunk for name in wanted for chunk in chunks.get(name, ()))


def _require_same_factors(path: Path, config: DecoderConfig) -> None:
    """Raises CheckpointError if weights would compute something else under the factors of muP or CompleteP here."""
    there, here = Factors(), Factors.of(config)
    folder = None if is_hugging_face(path) else open_step(path)
    if folder is not None and recipe_of(folder).model.parametrization != "standard":
        there = Factors.of(history_of(folder).config)
    if here != there:
        raise CheckpointError(
            f"checkpoint.initial_load_path: {path.name} was trained with {there}, and this model has {here}. Give "
            "model.parametrization and model.mup as there; or, for weights of the standard parametrisation, the sizes "
            "of their model as those of [model.mup]"
        )
