"""Where a command writes a folder: a new one with room for it, and for a checkpoint what makes it one."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from titan_growth.checkpoint.folder import LINEAGE, RECIPE, file_entry, write_manifest
from titan_growth.checkpoint.history import Lineage
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.saving import cause_of
from titan_growth.checkpoint.writer import ShardWriter
from titan_growth.config.loader import to_toml
from titan_growth.config.schema.recipe import Recipe
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem, TitanGrowthError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.text import gib

FileEntries = dict[str, dict[str, Any]]
"""Name -> entry of the manifest."""


def require_new(target: Path, source: Path) -> None:
    """Raises ConfigError unless `--to` names a folder that is empty or not there, and not inside of `--from`."""
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ConfigError([Problem("--to", f"{target} is inside the source", "Name another folder")])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError([Problem("--to", f"{target} is not empty", "Name a folder that does not exist")])


@contextlib.contextmanager
def new_folder(target: Path, num_bytes: int, content: str) -> Iterator[None]:
    """Makes a folder with room for its content. What fails inside is one error about the folder, which is emptied."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target).free) < num_bytes:
            raise CheckpointError(f"{target}: {content} needs {gib(num_bytes)}, but only {gib(free)} are free")
        yield
    except (OSError, CheckpointException, TitanGrowthError) as error:
        for file in target.iterdir() if target.is_dir() else ():
            file.unlink(missing_ok=True)
        cause = cause_of(error, OSError, TitanGrowthError)
        if isinstance(cause, TitanGrowthError):
            raise cause from error
        # torch's archive writer notices that bytes are missing but not why.
        text = str(cause).strip().split("\n")[0] or type(cause).__name__
        reason = f"a write failed; is the disk full? ({text})"
        if isinstance(cause, OSError):
            reason = cause.strerror or text
        raise CheckpointError(f"{target}: {reason}. Nothing was committed") from error


class _Planner(DefaultSavePlanner):
    """A DCP save plan whose tensors are made when they are written."""

    def __init__(self, make: Callable[[str], Tensor], order: Callable[[str], str]) -> None:
        super().__init__()
        self.make, self.order = make, order

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=sorted(plan.items, key=lambda item: self.order(item.index.fqn)))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.make(write_item.index.fqn)


def save_tensors(
    tensors: Mapping[str, Tensor],
    target: Path,
    make: Callable[[str], Tensor],
    order: Callable[[str], str] = lambda name: "",
) -> FileEntries:
    """Writes the shards of a step folder, one tensor at a time.

    Args:
        tensors: without values.
        make: name to tensor.
        order: name to sort key.
    """
    writer = ShardWriter(target)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=writer, planner=_Planner(make, order), no_dist=True)
    return writer.entries


def commit(target: Path, recipe: Recipe, lineage: Lineage, manifest: Manifest, files: FileEntries) -> None:
    """Writes recipe, lineage, and the manifest, which makes the folder a checkpoint of these files."""
    write_atomic(target / RECIPE, to_toml(recipe))
    write_atomic(target / LINEAGE, lineage.to_json())
    texts = {name: file_entry(target / name) for name in (RECIPE, LINEAGE)}
    write_manifest(target, replace(manifest, files={**files, **texts}))
