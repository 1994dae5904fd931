"""Saving and loading step folders from all ranks together.

    save   fresh folder -> DCP shards of all ranks -> .metadata -> recipe, lineage -> manifest (= committed)
    load   newest committed -> checksums -> every wanted tensor is there, of the right size and type -> read in place

A folder without a manifest is the remains of a save that died; it is never loaded, and cleared when its step is saved
again. A checkpoint that fails its checks is named and the next older one is used; when none is left the run stops
rather than start from scratch.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from titan_growth.checkpoint.folder import (
    LINEAGE,
    METADATA,
    RECIPE,
    Manifest,
    StepFolder,
    committed_steps,
    file_entry,
    no_such_step,
    none_usable,
    open_step,
    step_path,
    write_manifest,
)
from titan_growth.checkpoint.lineage import RollBack
from titan_growth.checkpoint.reader import NamesOf, SafeReader
from titan_growth.checkpoint.retention import Retention, set_aside_after
from titan_growth.config.schema import Checkpoint
from titan_growth.tools.distributed import describe_os_error, fail_together, gather_objects, on_rank0
from titan_growth.tools.errors import CheckpointError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.run_folder import gib

logger = logging.getLogger("titan_growth")

Tensors = dict[str, Tensor]


class CheckpointManager:
    """The step folders of one run."""

    def __init__(self, section: Checkpoint, dump_folder: Path) -> None:
        self.section = section
        self.root = dump_folder / section.folder
        self.retention = Retention(self.root, section.keep_latest_k)

    # ---- choosing ------------------------------------------------------------------------------------------------

    def find(self) -> StepFolder | None:
        """The checkpoint to resume from: the newest good one, or that of `checkpoint.load_step`.

        Raises:
            CheckpointError: when the one asked for, or every one there is, cannot be used.
        """
        if not self.section.enable:
            return None
        candidates, refused = on_rank0(lambda: committed_steps(self.root))
        wanted = self.section.load_step
        for folder in candidates:
            if wanted not in (-1, folder.step):
                continue
            damage = self.damage(folder)
            if damage is None:
                for line in refused if wanted == -1 else []:
                    logger.error("%s", line)
                return folder
            refused.append(f"{folder.path.name} refused: {damage}")
        if wanted != -1:
            raise CheckpointError(f"checkpoint.load_step: {no_such_step(self.root, wanted, refused)}")
        if refused:
            raise CheckpointError(none_usable(self.root, refused))
        return None

    def damage(self, folder: StepFolder) -> str | None:
        """Reads all files of a checkpoint, divided over the ranks."""
        share = (dist.get_rank(), dist.get_world_size())
        return next((found for found in gather_objects(folder.damage(checksums=True, share=share)) if found), None)

    def set_aside_after(self, step: int) -> None:
        """Moves checkpoints of later steps out of the way when a run goes on from an earlier one.

        The user has gone back on purpose (`load_step`), or they were refused as damaged.
        """
        label = "superseded" if self.section.load_step != -1 else "damaged"
        moved = on_rank0(lambda: set_aside_after(self.root, step, label))
        if moved:
            logger.warning("going on from step %d: later checkpoints are kept as %s", step, ", ".join(moved))

    # ---- saving --------------------------------------------------------------------------------------------------

    def save(self, manifest: Manifest, tensors: Tensors, *, recipe_toml: str, lineage_json: str) -> StepFolder:
        """Writes and commits one checkpoint; every rank passes the tensors it holds.

        Raises:
            CheckpointError: on every rank, when it could not be written; nothing is left behind then.
        """
        path = step_path(self.root, manifest.progress.step)
        num_bytes = _stored_bytes(tensors)
        on_rank0(lambda: self._clear(path, num_bytes))
        errors: list[str] = []
        try:
            writer = FileSystemWriter(path, single_file_per_rank=True, sync_files=True)
            dcp.save(tensors, storage_writer=writer)
        except (Exception, CheckpointException) as error:  # DCP wraps whatever happened on any rank
            errors = [_root_cause(error)]
        self._fail_save(path, errors)

        files: dict[str, Any] = {}
        try:
            mine = f"__{dist.get_rank()}_"
            files = {file.name: file_entry(file) for file in path.iterdir() if file.name.startswith(mine)}
        except OSError as error:
            errors = [describe_os_error(error)]
        self._fail_save(path, errors)
        gathered = gather_objects(files)

        def commit() -> Manifest:
            write_atomic(path / RECIPE, recipe_toml)
            write_atomic(path / LINEAGE, lineage_json)
            entries = {name: entry for part in gathered for name, entry in part.items()}
            entries |= {name: file_entry(path / name) for name in (METADATA, RECIPE, LINEAGE)}
            complete = replace(manifest, files=entries)
            write_manifest(path, complete)
            return complete

        try:
            complete = on_rank0(commit)
        except CheckpointError:
            raise
        except Exception as error:
            self._fail_save(path, [str(error)])
            raise
        return StepFolder(path, complete)

    def _clear(self, path: Path, num_bytes: int) -> None:
        """Removes what a dead save left, and makes sure that the new one fits on the disk."""
        try:
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True)
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise CheckpointError(
                f"{path.name} was not saved: {describe_os_error(error)}. The checkpoints before it are whole"
            ) from None
        if free < num_bytes:
            path.rmdir()
            raise CheckpointError(
                f"{path.name} was not saved: it needs {gib(num_bytes)}, but only {gib(free)} are free in {self.root}. "
                "Make room and run the same command again; the run goes on from the last checkpoint"
            )

    def _fail_save(self, path: Path, errors: list[str]) -> None:
        message = f"{path.name} was not saved: {errors[0]}. The checkpoints before it are whole" if errors else ""
        try:
            fail_together([message] if message else [], CheckpointError)
        except CheckpointError:
            if dist.get_rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def prune(self, saved_step: int) -> None:
        """Removes the oldest checkpoints beyond `keep_latest_k`, in the background."""
        if dist.get_rank() == 0:
            self.retention.prune(saved_step)

    def close(self) -> None:
        """Returns when nothing is being removed any more."""
        self.retention.wait()

    def make_permanent(self, folder: StepFolder, held_out_loss: float) -> StepFolder:
        """Takes a committed checkpoint out of retention, as one that the model grows from."""
        if folder.manifest.permanent and folder.manifest.held_out_loss == held_out_loss:
            return folder
        manifest = replace(folder.manifest, permanent=True, held_out_loss=held_out_loss)
        permanent = StepFolder(folder.path, manifest)
        on_rank0(lambda: write_manifest(permanent.path, permanent.manifest))
        return permanent

    def roll_back(self, source: str, roll_back: RollBack) -> StepFolder:
        """Goes back to the checkpoint before a growth; later ones are set aside.

        Raises:
            CheckpointError: when it is not there, or damaged.
        """
        folder = on_rank0(lambda: open_step(self.root / source))
        damage = "it is not there" if folder is None else self.damage(folder)
        if folder is None or damage:
            raise CheckpointError(f"the growth cannot be taken back: {source} refused: {damage}")
        manifest = replace(folder.manifest, held_out_loss=None, roll_back=asdict(roll_back))
        # In this order: killed between the two, the run grows and rolls back once more.
        moved = on_rank0(lambda: set_aside_after(self.root, folder.step, "rolled-back"))
        on_rank0(lambda: write_manifest(folder.path, manifest))
        logger.warning("rolled back to %s; later checkpoints are kept as %s", source, ", ".join(moved) or "none")
        return StepFolder(folder.path, manifest)

    # ---- loading -------------------------------------------------------------------------------------------------

    def load(
        self,
        path: Path,
        tensors: Tensors,
        names_of: NamesOf | None = None,
        *,
        reader: SafeReader | None = None,
        casts: bool = False,
    ) -> SafeReader:
        """Reads every given tensor in place, each rank only the stored chunks that its shards overlap.

        Args:
            path: a step folder, ours or another program's.
            tensors: what to fill, plain or sharded.
            names_of: serves stored tensors under other names (a head that is tied).
            reader: of the folder, when the caller has one; `names_of` is then its affair.
            casts: take numbers of another type of float, too.

        Raises:
            CheckpointError: when a tensor is missing or does not fit, or a file cannot be read.
        """
        reader = reader or SafeReader(path, names_of)
        fail_together(misfits(reader, tensors, casts=casts), CheckpointError)
        errors: list[str] = []
        try:
            dcp.load(dict(tensors), storage_reader=reader, planner=DefaultLoadPlanner())
        except (Exception, CheckpointException) as error:  # DCP wraps whatever happened on any rank
            errors = [f"{path.name} refused: {_root_cause(error)}"]
        fail_together(errors, CheckpointError)
        return reader

    def stored_names(self, path: Path) -> set[str]:
        """Names of the tensors in a step folder."""
        return set(SafeReader(path).tensor_entries())


def misfits(reader: SafeReader, tensors: Mapping[str, Tensor], *, casts: bool = False) -> list[str]:
    """One message when the stored tensors are not the wanted ones, naming the first few."""
    try:
        stored = reader.tensor_entries()
    except CheckpointError as error:
        return [str(error)]
    wrong = []
    for name, tensor in tensors.items():
        if name not in stored:
            wrong.append(f"has no {name}")
        elif stored[name].size != tensor.shape:
            wrong.append(f"{name} is {_shape(stored[name].size)} there and {_shape(tensor.shape)} here")
        elif (dtype := stored[name].properties.dtype) != tensor.dtype and not (
            casts and dtype.is_floating_point and tensor.dtype.is_floating_point
        ):
            wrong.append(f"{name} is {dtype} there and {tensor.dtype} here")
    if not wrong:
        return []
    more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
    return [f"{reader.folder.name} refused: it is of another model: {'; '.join(wrong[:2])}{more}"]


def _stored_bytes(tensors: Tensors) -> int:
    """Bytes of a checkpoint: every tensor once, however many ranks hold it or a piece of it.

    Ranks with the same names hold the same tensors; only pipeline ranks differ. Random states are too small to count.
    """
    names = [name for name in tensors if not name.startswith("rng.")]
    num_bytes = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    return sum(dict(gather_objects((digest, num_bytes))).values())


def _shape(size: torch.Size) -> str:
    return " x ".join(str(length) for length in size) or "a scalar"


def _root_cause(error: BaseException) -> str:
    """The one line that matters of an exception that DCP has wrapped."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    cause: BaseException = error
    seen: Callable[[BaseException], BaseException | None] = lambda e: e.__cause__ or e.__context__  # noqa: E731
    while not isinstance(cause, OSError | CheckpointError) and (deeper := seen(cause)) is not None:
        cause = deeper
    if isinstance(cause, OSError):
        return describe_os_error(cause)
    text = str(cause).strip().split("\n")[0] or type(cause).__name__
    # torch's archive writer notices that bytes are missing but not why.
    return f"No space left on device, or another failed write ({text})" if "unexpected pos" in text else text
