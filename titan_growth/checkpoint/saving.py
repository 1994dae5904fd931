"""Saving a step folder from all ranks together, now or in the background.

    fresh folder -> DCP shards of all ranks, hashed as they are written -> .metadata -> recipe, lineage -> manifest

The manifest, written last, commits the checkpoint; whatever happens before that leaves nothing that a resume would
take. A save that fails is cleared away and tried again, on all ranks or on none, since they agree after each part of it
in a process group of their own. In the background the same happens in a thread, from copies of the tensors in host
memory. There is never more than one save under way: the next one waits for it, and says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from titan_growth.checkpoint.folder import LINEAGE, RECIPE, StepFolder, file_entry, step_path, write_manifest
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.retention import Retention
from titan_growth.checkpoint.staging import HostCopies, StagedPlanner
from titan_growth.checkpoint.writer import ShardWriter
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.liveness.waits import LAST_SAVE, STORAGE, waiting_for
from titan_growth.tools.collectives import describe_os_error, fail_together, gather_objects, on_rank0, saving_group
from titan_growth.tools.errors import CheckpointError, TitanGrowthError
from titan_growth.tools.files import free_bytes, remove_folder, sync_folder, write_atomic
from titan_growth.tools.logs import logger
from titan_growth.tools.text import gib

Tensors = dict[str, Tensor]
Result = TypeVar("Result")

_NICENESS = 10
"""Of the thread that writes beside the training: a tenth of a core's time where all are busy."""

WORTH_SAYING_SECONDS = 1.0
"""A save is worth a line when the training has waited so long for the one before it."""


@dataclass(frozen=True)
class Content:
    """Everything that goes into a step folder; each rank has its own tensors."""

    manifest: Manifest
    tensors: Tensors
    recipe_toml: str
    lineage_json: str
    copies: HostCopies | None = None
    """Where the values are, when the tensors have gone on."""


class Saver:
    """Writes the step folders of one run. Every rank calls the same methods in the same order.

    Args:
        section: `[checkpoint]`.
        root: the folder of the step folders.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(
        self, section: CheckpointConfig, root: Path, retention: Retention, resumed: StepFolder | None = None
    ) -> None:
        self.section = section
        self.root = root
        self.retention = retention
        self.last_saved = resumed
        """The newest checkpoint that this process has committed, or resumed from."""
        self.group = saving_group() if section.enable else None
        self._copies: HostCopies | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed for good on this rank, which `wait` will raise on all."""
        return self._error is not None

    def save(self, manifest: Manifest, tensors: Tensors, *, recipe_toml: str, lineage_json: str) -> None:
        """Writes and commits one checkpoint, or begins to; every rank passes the tensors it holds.

        With `checkpoint.async_mode` it returns when the tensors have been copied; `wait` tells how it ended.

        Raises:
            CheckpointError: on every rank, when it, or the one before it, could not be written; nothing is left of it.
        """
        began = time.perf_counter()
        before = self._thread
        self.wait()
        waited = time.perf_counter() - began
        if before is not None and waited >= WORTH_SAYING_SECONDS:
            logger.warning(
                "waited %.1f s for the checkpoint before to be written: checkpoint.interval is short for it", waited
            )
        content = Content(manifest, tensors, recipe_toml, lineage_json)
        if self.section.async_mode == "disabled":
            self._save(content)
            return
        if self._copies is None:
            self._copies = HostCopies(pinned=self.section.async_mode == "async_with_pinned_mem")
        self._copies.fill(tensors)
        self._thread = Thread(
            target=self._save_in_background,
            args=(replace(content, copies=self._copies),),
            name="checkpoint-save",
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way any more.

        Raises:
            CheckpointError: on every rank, when the last one in the background has failed.
            RuntimeError: of its collective, when it has failed because another rank is gone.
        """
        if self._thread is not None:
            with waiting_for(STORAGE):
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save_in_background(self, content: Content) -> None:
        assert content.copies is not None, "what is written in the background has been copied"
        with contextlib.suppress(AttributeError, OSError):
            # On Linux a thread has a priority of its own: where cores are short, the training has them first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            content.copies.wait()
            self._save(content)
        except Exception as error:  # also that of a rank which is gone: whoever waits treats it as what it is
            self._error = error

    def _save(self, content: Content) -> None:
        """Writes a checkpoint, however often it takes, and removes old ones."""
        for attempt in range(self.section.save_retries + 1):
            try:
                folder = self._write(content)
                break
            except CheckpointError as error:
                if attempt == self.section.save_retries:
                    raise
                pause_seconds = 2**attempt
                logger.error("%s. Trying again in %d s", str(error).rstrip("."), pause_seconds)
                time.sleep(pause_seconds)
        self.last_saved = folder
        logger.info("saved %s", folder.path)
        if dist.get_rank() == 0:
            try:
                self.retention.prune(folder.step)
            except Exception as error:  # the checkpoint is there; what is too many goes with the next
                logger.warning("old checkpoints were not removed: %s", root_cause(error))

    def _write(self, content: Content) -> StepFolder:
        path = step_path(self.root, content.manifest.progress.step)
        num_bytes = self._stored_bytes(content.tensors)
        on_rank0(_said_of(path, lambda: self._clear(path, num_bytes)), self.group)
        writer = ShardWriter(path, in_background=content.copies is not None)
        planner = DefaultSavePlanner() if content.copies is None else StagedPlanner(content.copies)
        errors: list[str] = []
        try:
            dcp.save(content.tensors, storage_writer=writer, planner=planner, process_group=self.group)
        except (Exception, CheckpointException) as error:  # DCP wraps whatever happened on any rank
            errors = [root_cause(error)]
        self._fail(path, errors)
        gathered = gather_objects(writer.entries, self.group)

        def commit() -> StepFolder:
            write_atomic(path / RECIPE, content.recipe_toml)
            write_atomic(path / LINEAGE, content.lineage_json)
            entries = {name: entry for part in gathered for name, entry in part.items()}
            entries |= {name: file_entry(path / name) for name in (RECIPE, LINEAGE)}
            complete = replace(content.manifest, files=entries)
            write_manifest(path, complete)
            return StepFolder(path, complete)

        try:
            return on_rank0(_said_of(path, commit), self.group)
        except CheckpointError:
            self._remove(path)
            raise

    def _stored_bytes(self, tensors: Tensors) -> int:
        """Bytes of a checkpoint: every tensor once, however many ranks hold it or a piece of it.

        Ranks with the same names hold the same tensors; only pipeline ranks differ. Random states are too small to
        count.
        """
        names = [name for name in tensors if not name.startswith("rng.")]
        num_bytes = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
        return sum(dict(gather_objects((digest, num_bytes), self.group)).values())

    def _clear(self, path: Path, num_bytes: int) -> None:
        """Removes what a dead save left, and makes sure that the new one fits on the disk."""
        self.retention.wait()  # what is being removed makes room
        if path.exists():
            remove_folder(path)
        path.mkdir(parents=True)
        sync_folder(path.parent)
        free = free_bytes(path)
        if free is not None and free < num_bytes:
            path.rmdir()
            raise CheckpointError(
                f"{path.name} was not saved: it needs {gib(num_bytes)}, but only {gib(free)} are free in {self.root}. "
                "Make room and run the same command again; the run goes on from the last checkpoint"
            )

    def _fail(self, path: Path, errors: list[str]) -> None:
        try:
            fail_together([_not_saved(path, error) for error in errors], CheckpointError, self.group)
        except CheckpointError:
            self._remove(path)
            raise

    def _remove(self, path: Path) -> None:
        if dist.get_rank() == 0:
            with contextlib.suppress(Exception):  # what is left is no checkpoint, and is cleared by the next save
                remove_folder(path)

    def close(self, most_seconds: float | None = None) -> None:
        """Returns when nothing is being written or removed any more; a save that has failed is reported by a line.

        Args:
            most_seconds: to wait for a save in the background, which may itself wait for a rank that is gone. It is in
                nobody's way: without its manifest it is no checkpoint.
        """
        if self._thread is not None:
            with waiting_for(LAST_SAVE):
                self._thread.join(most_seconds)
            if self._thread.is_alive():
                logger.warning("a checkpoint was still being written, and is given up")
                return
        try:
            self.wait()
        except TitanGrowthError as error:
            logger.error("%s", error)
        except Exception:
            logger.warning("a checkpoint was not finished: another rank is gone")
        self.retention.wait()


def _said_of(path: Path, work: Callable[[], Result]) -> Callable[[], Result]:
    """The work of a save on one rank, whose failures, of whatever kind, are those of the save on all ranks."""

    def said() -> Result:
        try:
            return work()
        except CheckpointError:
            raise
        except Exception as error:  # packages of stores have errors of their own
            raise CheckpointError(_not_saved(path, root_cause(error))) from error

    return said


def _not_saved(path: Path, reason: str) -> str:
    return f"{path.name} was not saved: {reason.rstrip('.')}. The checkpoints before it are whole"


def cause_of(error: BaseException, *telling: type[BaseException]) -> BaseException:
    """What is behind an exception that DCP has wrapped: the first of a kind that tells why, else the deepest."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    while not isinstance(error, telling) and (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error


def root_cause(error: BaseException) -> str:
    """The one line that matters of an exception that DCP has wrapped."""
    cause = cause_of(error, OSError, CheckpointError)
    if isinstance(cause, OSError):
        return describe_os_error(cause)
    return str(cause).strip().split("\n")[0] or type(cause).__name__
