"""`python -m titan_growth grow`: grow a checkpoint on disk, in one process and bounded memory.

The same operators, rules and reader as in a run. Tensors are made one at a time while they are written, so a model
needs no more memory than its largest tensor and what that is made of. The result is a step folder: another
run starts from it with `checkpoint.initial_load_path`, and its lineage names the checkpoint that it was grown from.
"""

from __future__ import annotations

import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from titan_growth.checkpoint.folder import LINEAGE, RECIPE, StepFolder, file_entry, write_manifest
from titan_growth.checkpoint.history import GrowthEvent, Lineage
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.checkpoint.writer import ShardWriter
from titan_growth.commands.args import CommandLine
from titan_growth.commands.growth_args import SETTINGS, add_settings, growth_map, planned_growth, settings_of
from titan_growth.commands.source import open_any
from titan_growth.commands.target import failure, require_new, require_space
from titan_growth.config.loader import to_toml, with_values
from titan_growth.config.plugins import load_plugins
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.config.schema.recipe import Recipe
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.read import read_grown
from titan_growth.growth.rules import MOMENTS, Rules
from titan_growth.growth.verify import verify_growth
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.models.roles import OPTIMIZER_PREFIX
from titan_growth.run.phases import recipe_in_phase
from titan_growth.tools.errors import ConfigError, GrowthError, Problem
from titan_growth.tools.files import write_atomic
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import folder_at
from titan_growth.tools.text import gib


def command_line() -> CommandLine:
    """The arguments of `grow`."""
    line = CommandLine(
        "grow",
        """Grows a checkpoint on disk, without a run. The settings are those of [[growth.stages]]; moments are copied
        unless --optimizer-state says otherwise ("reset" leaves them out).""",
        example="--from outputs/checkpoint/step-5000 --operator stack --factor 4 --to grown/step-5000",
        statuses="0 grown and verified, 1 failed, 2 wrong arguments",
    )
    operators = "stack, interpose, middle, map, zero_depth, split_width, zero_width, or one of a plugin."
    line.source_and_target("A committed step folder, or a Hugging Face folder.", "The step folder to write.")
    line.option("--operator", "NAME", operators, required=True)
    add_settings(line, SETTINGS, optimizer_state="copy")
    line.option("--seed", "N", "Seed of new values.", _seed, default=0)
    line.plugins()
    return line


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return command_line().run(argv or ["--help"], _grow)


def _grow(args: Namespace) -> int:
    load_plugins(args.plugins)
    planned = planned_growth({"operator": args.operator, **settings_of(args, SETTINGS)})
    source, target = folder_at(args.source), Path(args.target)
    print(grow_checkpoint(source, target, planned, seed=args.seed, plugins=args.plugins))
    return 0


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"expected a whole number, got '{text}'")
    return int(text)


def grow_checkpoint(
    source: Path, target: Path, planned: PlannedGrowth, *, seed: int = 0, plugins: Sequence[str] = ()
) -> str:
    """Writes the grown model of a step folder into another one; returns one line about it.

    Args:
        plugins: those already loaded.

    Raises:
        ConfigError: when the growth does not fit the model, or the target is in the way.
        CheckpointError: when the source cannot be used or the target not written.
        GrowthError: when what was written is not what it should be. Nothing is committed then.
    """
    began = time.perf_counter()
    opened = open_any(source, plugins)
    folder, recipe = opened.folder, opened.recipe
    growth = _map(opened.config, planned)
    require_new(target, source)
    module = family_module(recipe.model.name)
    rules = Rules(growth, planned, module.ROLES, growth.after.tied)
    std_of: Callable[[str], float | None] = lambda name: module.init_rule(growth.after, name)  # noqa: E731
    with_state = rules.reads_state() and not folder.manifest.model_only
    stored = opened.reader()
    tensors = _meta_tensors(module, growth.after, getattr(torch, recipe.training.dtype), with_state)
    tensors = _as_stored(tensors, rules, stored)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        require_space(target, num_bytes, "the grown model")
        reader = _OneSourceReader(stored)
        planner = _GrowingPlanner(reader, rules, std_of, seed)
        writer = ShardWriter(target)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)
        _verify(opened.reader(), target, tensors, rules, std_of)
        event = _event(folder, planned, growth, time.perf_counter() - began, reader.num_bytes_read)
        files = writer.entries
        _commit(folder, recipe, target, growth, event, files=files, model_only=not with_state, plugins=plugins)
    except (OSError, CheckpointException) as error:
        raise failure(target, error) from error
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


def _meta_tensors(module: Any, config: DecoderConfig, dtype: torch.dtype, with_state: bool) -> dict[str, Tensor]:
    """Every tensor of the grown model's checkpoint, without values."""
    with torch.device("meta"):
        model = module.Decoder(config, 8).to(dtype)
        tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
        if with_state:
            for name, weight in list(tensors.items()):
                for key in MOMENTS:
                    tensors[f"{OPTIMIZER_PREFIX}{name}.{key}"] = torch.empty_like(weight)
                tensors[f"{OPTIMIZER_PREFIX}{name}.step"] = torch.empty((), dtype=torch.float32)
    return tensors


def _as_stored(tensors: dict[str, Tensor], rules: Rules, stored: SafeReader) -> dict[str, Tensor]:
    """The same tensors, of the types that their sources have: another program's folder may have more than one."""
    types = {name: entry.properties.dtype for name, entry in stored.tensor_entries().items()}
    return {name: tensor.to(types.get(rules.of(name).source or "", tensor.dtype)) for name, tensor in tensors.items()}


class _OneSourceReader(SafeReader):
    """Keeps the chunks of one stored tensor, for the layers that are all made of it."""

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
            self._kept[chunk] = self.stored.read_chunk(chunk)  # in memory of its own, since it stays
            self.num_bytes_read = self.stored.num_bytes_read
        return self._kept[chunk]


class _GrowingPlanner(DefaultSavePlanner):
    """A DCP save plan whose tensors are made when they are written, those of one source one after another."""

    def __init__(self, reader: _OneSourceReader, rules: Rules, std_of: Any, seed: int) -> None:
        super().__init__()
        self.reader, self.rules, self.std_of, self.seed = reader, rules, std_of, seed

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        ordered = sorted(plan.items, key=lambda item: self.rules.of(item.index.fqn).source or "")
        self.plan = replace(plan, items=ordered)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn
        meta = self.lookup_object(write_item.index)
        made = {name: torch.empty(meta.shape, dtype=meta.dtype)}
        read_grown(self.reader.folder, made, self.rules.of, std_of=self.std_of, seed=self.seed, reader=self.reader)
        return made[name]


def _verify(source: SafeReader, target: Path, tensors: dict[str, Tensor], rules: Rules, std_of: Any) -> None:
    """Reads back what was written, one tensor at a time, and compares it with what the source makes of it."""
    stored, written = _OneSourceReader(source), SafeReader(target)
    chunks = written.chunks()
    for name in sorted(tensors, key=lambda one: rules.of(one).source or ""):
        (chunk,) = chunks[name]
        wrong = verify_growth(source.folder, {name: written.read_chunk(chunk)}, rules.of, std_of=std_of, reader=stored)
        if wrong:
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


def _commit(
    folder: StepFolder,
    recipe: Recipe,
    target: Path,
    growth: GrowthMap,
    event: GrowthEvent,
    *,
    files: dict[str, dict[str, Any]],
    model_only: bool,
    plugins: Sequence[str],
) -> None:
    lineage = folder.lineage()
    ancestors = Lineage(ancestors=(*lineage.ancestors, *lineage.events, event))
    num_growths = len(lineage.events)
    now = recipe_in_phase(recipe, num_growths)
    given_lrs = [stage.lr for stage in recipe.growth.active_stages[:num_growths] if stage.lr is not None]
    if given_lrs:
        now = with_values(now, {"optimizer.lr": given_lrs[-1]})
    grown = _recipe_grown(now, growth.after, plugins)
    write_atomic(target / RECIPE, to_toml(grown))
    write_atomic(target / LINEAGE, ancestors.to_json())
    manifest = Manifest(
        progress=folder.manifest.progress,
        num_layers=growth.after.num_layers,
        num_ranks=1,
        mesh="grown on disk",
        model_only=model_only,
        permanent=False,
        metrics_offset=0,
        seconds=folder.manifest.seconds + (event.seconds or 0.0),
        data=folder.manifest.data,
        files={**files, **{name: file_entry(target / name) for name in (RECIPE, LINEAGE)}},
    )
    write_manifest(target, manifest)


def _recipe_grown(recipe: Recipe, config: DecoderConfig, plugins: Sequence[str]) -> Recipe:
    """The recipe of a run with the grown model: the checkpoint's own at that step, without its growths."""
    grown = with_values(
        recipe,
        {
            "plugins": sorted({*recipe.plugins, *plugins}),
            "growth.stages": [],
            "growth.base": {},
            **{f"model.{key}": size for key, size in config.sizes.items()},
            "model.head_dim": config.head_dim,
            "model.multiple_of": None,
            "model.ffn_dim_multiplier": None,
            "model.norm_eps": config.norm_eps,
            "model.qk_norm_eps": config.qk_norm_eps,
        },
    )
    made = model_config_of(grown.model, found := Findings())
    assert made == config, f"the recipe written with a grown model makes another one: {made}, {found.problems}"
    return grown


def _sizes(config: DecoderConfig) -> str:
    return f"{config.num_layers} layers of width {config.dim}"
