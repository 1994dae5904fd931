"""`python -m titan_growth average`: the mean of the weights of a run's last checkpoints.

Latest weight averaging (Kaddour, 2022; Sanyal et al., 2023): the mean of checkpoints some hundred steps apart has a
lower loss than the last of them while the learning rate is high. One tensor at a time is added up in float64 and
rounded once, so memory must hold the largest three times. The result is a step folder with weights only.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from titan_growth.checkpoint.folder import MANIFEST, StepFolder, open_step, root_of
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.checkpoint.steps import CommittedSteps, committed_steps, step_of
from titan_growth.commands.args import CommandLine
from titan_growth.commands.source import Source, open_source, whole_tensor
from titan_growth.commands.target import commit, new_folder, require_new, save_tensors
from titan_growth.config.plugins import load_plugins
from titan_growth.models.hugging_face import parameter_shapes
from titan_growth.models.registry import family_module
from titan_growth.run.fresh import earlier_recipe
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, RefusedCheckpointError
from titan_growth.tools.location import folder_at
from titan_growth.tools.text import gib, many


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ValueError(f"expected a whole number of at least 2, got '{text}'")
    return int(text)


_LINE = CommandLine(
    "average",
    """Writes the mean of the weights of a run's last checkpoints as a step folder, which export, grow and
    checkpoint.initial_load_path take. All must be of one model: a growth in between is refused.""",
    example="--from outputs/run --last 5 --to averaged/step-5000",
    statuses="0 written and read back, 1 failed, 2 wrong arguments",
)
_LINE.source_and_target("A run's dump folder, or a folder of step-N folders.", "The step folder to write.")
_LINE.option("--last", "K", "Average the K newest checkpoints.", _several, required=True)
_LINE.plugins()


@_LINE.command
def main(args: Namespace) -> int:
    """Writes the folder; returns the exit status."""
    load_plugins(args.plugins)
    source, target = folder_at(args.source), Path(args.target)
    found = _checkpoints(source)
    if len(found.usable) < args.last:
        message = f"{source} has {many(len(found.usable), 'usable checkpoint')}, fewer than {args.last}"
        raise ConfigError([Problem("--last", message, "A run keeps the newest checkpoint.keep_latest_k")])
    require_new(target, source)
    require_new(target, found.usable[0].path.parent)
    newest: list[Source] = []
    refused = list(found.refused)
    for folder in found.usable:
        if len(newest) == args.last:
            break
        try:
            _require_kept(folder)
            newest.insert(0, open_source(folder.path))
        except RefusedCheckpointError as error:
            refused.append(error)
    for left_out in refused:
        if len(newest) < args.last or step_of(left_out.folder) > newest[0].folder.step:
            print(f"left out: {left_out}")
    if len(newest) < args.last:
        message = f"{source} has {many(len(newest), 'checkpoint')} that can be read, fewer than {args.last}"
        raise CheckpointError(message)
    try:
        print(average(newest, target))
    except CheckpointError:
        for one in newest:
            _require_kept(one.folder)
        raise
    return 0


def _require_kept(folder: StepFolder) -> None:
    """Raises RefusedCheckpointError when a checkpoint that was there is not any more: a run that goes on removes old
    ones."""
    if not (folder.path / MANIFEST).is_file():
        kept = "The run keeps the newest checkpoint.keep_latest_k"
        raise folder.refused(f"it was removed while the mean was made. {kept}: average fewer, or raise it")


def _checkpoints(source: Path) -> CommittedSteps:
    """What a run, or a folder of step folders, holds."""
    if not source.is_dir():
        raise ConfigError([Problem("--from", f"{source}: no such folder", "Name a run's dump folder")])
    if open_step(source) is not None:
        raise ConfigError([Problem("--from", f"{source} is one checkpoint", "Name the run's dump folder")])
    try:
        recipe = earlier_recipe(source)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}. Name the folder of its step-N folders") from None
    return committed_steps(source if recipe is None else root_of(recipe.checkpoint.folder, source))


def average(sources: Sequence[Source], target: Path) -> str:
    """Writes the mean of some checkpoints' weights into a step folder; returns one line about it.

    Args:
        sources: of one run, oldest first.

    Raises:
        CheckpointError: when they are not of one model, one cannot be read, or the target cannot be written. Nothing is
            committed then.
    """
    last = sources[-1]
    shapes = dict(parameter_shapes(last.config, family_module(last.recipe.model.name).ROLES))
    readers = [source.reader() for source in sources]
    _require_one_model(sources)
    for reader in readers:
        _require_same_types(reader, readers[-1], shapes)
    entries = readers[-1].tensor_entries()
    tensors = {
        name: torch.empty(shape, dtype=entries[name].properties.dtype, device="meta") for name, shape in shapes.items()
    }
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    chunks = [reader.chunks() for reader in readers]
    digests: dict[str, str] = {}

    def make(name: str) -> Tensor:
        total = torch.zeros(shapes[name], dtype=torch.float64)
        for reader, stored in zip(readers, chunks, strict=True):
            total += whole_tensor(reader, stored[name], shapes[name])
        if not bool(torch.isfinite(total).all()):
            raise last.folder.refused(f"the mean of {name} is not finite")
        mean = total.div_(len(readers)).to(tensors[name].dtype)
        digests[name] = _digest(mean)
        return mean

    with new_folder(target, num_bytes, "the mean"):
        files = save_tensors(tensors, target, make)
        _read_back(target, digests)
        names = tuple(str(source.folder.path.resolve()) for source in sources)
        manifest = replace(
            last.folder.manifest,
            num_ranks=1,
            mesh="averaged on disk",
            model_only=True,
            permanent=False,
            metrics_offset=0,
            held_out_loss=None,
            roll_back=None,
            recent_losses=[],
            stability={},
            files={},
        )
        commit(target, last.recipe, replace(last.folder.lineage(), averaged=names), manifest, files)
    steps = ", ".join(f"{source.folder.step:,}" for source in sources)
    return f"{target}: the mean of steps {steps}: {last.config.num_params:,} parameters, {gib(num_bytes)} written"


def _require_one_model(sources: Sequence[Source]) -> None:
    """Raises CheckpointError when a checkpoint is of another model than the last one."""
    last = sources[-1]
    same = [(one.recipe.model.name, one.config) == (last.recipe.model.name, last.config) for one in sources]
    if all(same):
        return
    other = sources[len(same) - 1 - same[::-1].index(False)]
    before, after = other.config.sizes, last.config.sizes
    if before == after:  # the rotary base may grow alone
        before, after = vars(other.config), vars(last.config)
    changes = ", ".join(f"{key} {before[key]} -> {value}" for key, value in after.items() if before[key] != value)
    grown = len(last.lineage.events) > len(other.lineage.events)
    why = f"{'the model grew in between' if grown else 'they are of two models'} ({changes})"
    raise other.folder.refused(
        f"it has no mean with {last.folder.path.name}: {why}. Those of one model are the last {same[::-1].index(False)}"
    )


def _require_same_types(reader: SafeReader, last: SafeReader, names: Mapping[str, object]) -> None:
    """Raises CheckpointError when a tensor of a checkpoint has another type than in the last one."""
    here, there = last.tensor_entries(), reader.tensor_entries()
    for name in names:
        if (dtype := there[name].properties.dtype) != (other := here[name].properties.dtype):
            raise reader.refused(f"its {name} is {dtype}, and that of {last.folder.name} {other}")


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _read_back(target: Path, digests: Mapping[str, str]) -> None:
    """Compares what was written with what was made. Raises CheckpointError when they differ."""
    written = SafeReader(target)
    chunks = written.chunks()
    for name, digest in digests.items():
        (chunk,) = chunks[name]
        if _digest(written.read_chunk(chunk)) != digest:
            raise CheckpointError(f"{target}: {name} is not what was written. Nothing was committed")
