"""`python -m titan_growth grow`: grow a checkpoint on disk, in one process and bounded memory.

Operators, rules and reader are those of a run. Tensors are made one at a time while they are written, so memory must
hold the largest tensor and what it is made of. The result is a step folder: a run starts from it with
`checkpoint.initial_load_path`, and its lineage names the checkpoint it was grown from.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import GrowthEvent, Lineage
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.commands.args import CommandLine
from titan_growth.commands.foreign import open_with_recipe
from titan_growth.commands.growth_args import (
    SETTINGS,
    add_settings,
    growth_map,
    model_keys,
    planned_growth,
    settings_of,
)
from titan_growth.commands.source import Source
from titan_growth.commands.target import commit, new_folder, require_new, save_tensors
from titan_growth.config.loader import with_values
from titan_growth.config.plugins import load_plugins
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.read import read_grown
from titan_growth.growth.rules import Rules
from titan_growth.growth.verify import verify_growth
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.models.roles import OPTIMIZER_PREFIX
from titan_growth.optimizers.base import state_of
from titan_growth.run.phases import recipe_in_phase
from titan_growth.tools.errors import ConfigError, GrowthError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import folder_at
from titan_growth.tools.text import gib


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"expected a whole number, got '{text}'")
    return int(text)


_LINE = CommandLine(
    "grow",
    """Grows a checkpoint on disk, without a run. The settings are those of [[growth.stages]]; moments are copied
    unless --optimizer-state says otherwise ("reset" leaves them out).""",
    example="--from outputs/checkpoint/step-5000 --operator stack --factor 4 --to grown/step-5000",
    statuses="0 grown and verified, 1 failed, 2 wrong arguments",
)
_OPERATORS = "stack, interpose, middle, map, zero_depth, split_width, zero_width, identity, or one of a plugin."
_LINE.source_and_target(
    "A committed step folder, one of torchtitan, or a Hugging Face folder.", "The step folder to write."
)
_LINE.option("--operator", "NAME", _OPERATORS, required=True)
add_settings(_LINE, SETTINGS, optimizer_state="copy")
_LINE.option("--seed", "N", "Seed of new values.", _seed, default=0)
_LINE.recipe_of_another()
_LINE.plugins()


@_LINE.command
def main(args: Namespace) -> int:
    """Grows the checkpoint; returns the exit status."""
    load_plugins(args.plugins)
    planned = planned_growth({"operator": args.operator, **settings_of(args, SETTINGS)})
    source, target = folder_at(args.source), Path(args.target)
    opened = open_with_recipe(source, args.recipe_file)
    print(grow_checkpoint(opened, target, planned, seed=args.seed, plugins=args.plugins))
    return 0


def grow_checkpoint(
    opened: Source, target: Path, planned: PlannedGrowth, *, seed: int = 0, plugins: Sequence[str] = ()
) -> str:
    """Writes the grown model of a checkpoint into a step folder; returns one line about it.

    Args:
        plugins: those loaded besides the recipe's.

    Raises:
        ConfigError: when the growth does not fit the model, or the target is in the way.
        CheckpointError: when the target cannot be written.
        GrowthError: when what was written is wrong. Nothing is committed then.
    """
    began = time.perf_counter()
    folder, recipe = opened.folder, opened.recipe
    growth = _map(opened.config, planned)
    require_new(target, folder.path)
    module = family_module(recipe.model.name)
    rules = Rules(growth, planned, module)
    with_state = planned.optimizer_state != "reset" and not folder.manifest.model_only
    stored = opened.reader()
    dtype, optimizer = getattr(torch, recipe.training.dtype), recipe.optimizer if with_state else None
    tensors = _meta_tensors(module, growth.after, dtype, optimizer)
    tensors = _as_stored(tensors, rules, stored)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    reader = _OneSourceReader(stored)

    def make(name: str) -> Tensor:
        made = {name: torch.empty_like(tensors[name], device="cpu")}
        read_grown(reader, made, rules, seed=seed)
        return made[name]

    with new_folder(target, num_bytes, "the grown model"):
        files = save_tensors(tensors, target, make, order=lambda name: rules.of(name).source or "")
        _verify(opened.reader(), target, tensors, rules)
        event = _event(folder, planned, growth, time.perf_counter() - began, reader.num_bytes_read)
        lineage = folder.lineage()
        ancestors = Lineage(ancestors=(*lineage.ancestors, *lineage.events, event))
        grown = _recipe_grown(recipe, len(lineage.events), growth.after, plugins)
        commit(target, grown, ancestors, _manifest(folder, event, model_only=not with_state), files)
    return (
        f"{target}: {_sizes(growth.before)} -> {_sizes(growth.after)}, {growth.after.num_params:,} parameters"
        f"{'' if with_state else ', without moments'}, {gib(num_bytes)} written and verified"
    )


def _map(before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap:
    growth = growth_map(before, planned)
    if growth.masked or growth.learned:
        message = f"'{planned.operator}' goes on during training, so it cannot be done on disk"
        raise ConfigError([Problem("--operator", message, "Name it in [[growth.stages]] of a run")])
    return growth


def _meta_tensors(
    module: Any, config: DecoderConfig, dtype: torch.dtype, optimizer: OptimizerConfig | None
) -> dict[str, Tensor]:
    """Every tensor of the grown model's checkpoint, without values; `optimizer` where that has its state too."""
    with torch.device("meta"):
        model = module.Decoder(config, 8).to(dtype)
        tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
        if optimizer is not None:
            for name, weight in list(tensors.items()):
                for kept in state_of(optimizer, config.tied.get(name, name), weight.dim()):
                    like = torch.empty_like(weight) if kept.power else torch.empty((), dtype=torch.float32)
                    tensors[f"{OPTIMIZER_PREFIX}{name}.{kept.name}"] = like
    return tensors


def _as_stored(tensors: dict[str, Tensor], rules: Rules, stored: SafeReader) -> dict[str, Tensor]:
    """The same tensors, in the dtypes of their sources: a Hugging Face folder may mix them."""
    types = {name: entry.properties.dtype for name, entry in stored.tensor_entries().items()}
    return {name: tensor.to(types.get(rules.of(name).source or "", tensor.dtype)) for name, tensor in tensors.items()}


class _OneSourceReader(SafeReader):
    """Keeps the chunks of one stored tensor for all the layers made of it."""

    def __init__(self, stored: SafeReader) -> None:
        super().__init__(stored.folder)
        self.stored = stored
        self._kept: dict[StoredChunk, Tensor] = {}
        self._chunks = stored.chunks()

    def chunks(self) -> dict[str, list[StoredChunk]]:
        return self._chunks

    def read_chunk(self, chunk: StoredChunk, buffer: Tensor | None = None) -> Tensor:
        if any(kept.name != chunk.name for kept in self._kept):
            self._kept.clear()
        if chunk not in self._kept:
            self._kept[chunk] = self.stored.read_chunk(chunk)  # without the buffer: it is kept
            self.num_bytes_read = self.stored.num_bytes_read
        return self._kept[chunk]


def _verify(source: SafeReader, target: Path, tensors: dict[str, Tensor], rules: Rules) -> None:
    """Reads each tensor back and compares it with what the source makes of it."""
    stored, written = _OneSourceReader(source), SafeReader(target)
    chunks = written.chunks()
    for name in sorted(tensors, key=lambda one: rules.of(one).source or ""):
        (chunk,) = chunks[name]
        if wrong := verify_growth(stored, {name: written.read_chunk(chunk)}, rules):
            raise GrowthError(f"the grown model is wrong: {wrong[0]}")


def _event(
    folder: StepFolder, planned: PlannedGrowth, growth: GrowthMap, seconds: float, num_bytes: int
) -> GrowthEvent:
    progress = folder.manifest.progress
    return GrowthEvent(
        step=progress.step,
        tokens=progress.tokens,
        flops=progress.flops,
        operator=planned.operator,
        stage=planned.model_dump(exclude_defaults=True, exclude={"at"}),
        from_sizes=growth.before.sizes,
        to_sizes=growth.after.sizes,
        layer_map=growth.layers,
        source=str(folder.path.resolve()),
        mesh="grown on disk",
        num_ranks=1,
        loss_before=None,
        seconds=seconds,
        bytes_read=num_bytes,
    )


def _manifest(folder: StepFolder, event: GrowthEvent, *, model_only: bool) -> Manifest:
    return Manifest(
        progress=folder.manifest.progress,
        num_layers=event.to_sizes["n_layers"],
        num_ranks=event.num_ranks,
        mesh=event.mesh,
        model_only=model_only,
        permanent=False,
        metrics_offset=0,
        seconds=folder.manifest.seconds + (event.seconds or 0.0),
        data=folder.manifest.data,
    )


def _recipe_grown(recipe: Recipe, num_growths: int, config: DecoderConfig, plugins: Sequence[str]) -> Recipe:
    """The checkpoint's recipe as it holds after its growths, for a run with the grown model and no more of them."""
    lrs = [stage.lr for stage in recipe.growth.active_stages[:num_growths] if stage.lr is not None]
    grown = with_values(
        recipe_in_phase(recipe, num_growths),
        {
            **({"optimizer.lr": lrs[-1]} if lrs else {}),
            "plugins": sorted({*recipe.plugins, *plugins}),
            "growth.stages": [],
            "growth.base": {},
            **model_keys(config),
            "model.norm_eps": config.norm_eps,
            "model.qk_norm_eps": config.qk_norm_eps,
        },
    )
    made = model_config_of(grown.model, found := Findings())
    assert made == config, f"the recipe written with a grown model makes another one: {made}, {found.problems}"
    return grown


def _sizes(config: DecoderConfig) -> str:
    return f"{config.num_layers} layers of width {config.dim}"
