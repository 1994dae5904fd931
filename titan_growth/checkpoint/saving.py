"""Saving a step folder from all ranks, synchronously or in the background.

    fresh folder -> DCP shards of all ranks, hashed as they are written -> .metadata -> recipe, lineage -> manifest
    -> ledger

The manifest commits the checkpoint, and the ledger remembers that it did. A resume ignores anything short of that. A
failed save is cleared and retried on all ranks or none: they agree after each part, in a process group of their own. A
background save does the same in a thread, from copies of the tensors in host memory. Only one save runs at a time; the
next one waits for it, and says so.
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
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from titan_growth.checkpoint.folder import LINEAGE, RECIPE, StepFolder, file_entry, write_manifest
from titan_growth.checkpoint.ledger import LedgerFile
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.retention import Retention
from titan_growth.checkpoint.staging import HostCopies, StagedPlanner
from titan_growth.checkpoint.steps import step_of, step_path
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
"""Of the background writer: a tenth of a core where all cores are busy."""

MAX_QUIET_WAIT_SECONDS = 1.0
"""Waiting longer than this for the previous save is logged."""


@dataclass(frozen=True)
class Content:
    """Everything that goes into a step folder; tensors are this rank's."""

    manifest: Manifest
    tensors: Tensors
    recipe_toml: str
    lineage_json: str
    copies: HostCopies | None = None
    """The values to write, if training goes on meanwhile."""


class Saver:
    """Writes the step folders of one run. Every rank calls the same methods in the same order.

    Args:
        section: `[checkpoint]`.
        ledger: of the folder of the step folders.
        resumed: the checkpoint the run resumes from.
    """

    def __init__(
        self, section: CheckpointConfig, ledger: LedgerFile, retention: Retention, resumed: StepFolder | None = None
    ) -> None:
        self.section = section
        self.root = ledger.root
        self.ledger = ledger
        self.retention = retention
        self.last_saved = resumed
        """The newest checkpoint this process committed or resumed from."""
        self.group = saving_group() if section.enable else None
        pinned = section.async_mode == "async_with_pinned_mem"
        self._copies = None if section.async_mode == "disabled" else HostCopies(pinned=pinned)
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a background save failed on this rank after its last retry; `wait` raises it on all ranks."""
        return self._error is not None

    def save(self, manifest: Manifest, tensors: Tensors, *, recipe_toml: str, lineage_json: str) -> None:
        """Writes and commits a checkpoint; every rank passes the tensors it holds.

        With `checkpoint.async_mode` it returns once the tensors are copied, and `wait` reports the outcome.

        Raises:
            CheckpointError: on every rank, if this save or the previous one failed; nothing of it is left.
        """
        began = time.perf_counter()
        previous = self._thread
        self.wait()
        waited = time.perf_counter() - began
        if previous is not None and waited >= MAX_QUIET_WAIT_SECONDS:
            logger.warning("waited %.1f s for the previous save: checkpoint.interval is too short for it", waited)
        content = Content(manifest, tensors, recipe_toml, lineage_json, self._copies)
        if self._copies is None:
            self._save(content)
            return
        self._copies.fill(tensors)
        self._thread = Thread(target=self._save_in_background, args=(content,), name="checkpoint-save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            CheckpointError: on every rank, if the last background save failed.
            RuntimeError: from its collective, if it failed because another rank is gone.
        """
        if self._thread is not None:
            with waiting_for(STORAGE):
                self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save_in_background(self, content: Content) -> None:
        assert content.copies is not None, "a background save writes copies"
        with contextlib.suppress(AttributeError, OSError):
            # Linux has a priority per thread: training goes first where cores are short.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            content.copies.wait()
            self._save(content)
        except Exception as error:  # also the loss of another rank; `wait` re-raises it
            self._error = error

    def _save(self, content: Content) -> None:
        """Writes a checkpoint, with retries, and removes old ones."""
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
            except Exception as error:  # the new checkpoint is valid; the next save prunes again
                logger.warning("old checkpoints were not removed: %s", root_cause(error))

    def _write(self, content: Content) -> StepFolder:
        path = step_path(self.root, content.manifest.progress.step)
        num_bytes = self._stored_bytes(content.tensors)
        on_rank0(_as_save_error(path, lambda: self._clear(path, num_bytes)), self.group)
        try:
            entries = self._write_shards(path, content)
            return on_rank0(_as_save_error(path, lambda: self._commit(path, content, entries)), self.group)
        except CheckpointError:
            if dist.get_rank() == 0:
                with contextlib.suppress(Exception):  # the remains are not a checkpoint, and the next save clears them
                    remove_folder(path)
            raise

    def _write_shards(self, path: Path, content: Content) -> dict[str, Any]:
        """Writes all but the texts. Returns the manifest's entries of the files of all ranks."""
        writer = ShardWriter(path, in_background=content.copies is not None)
        planner = DefaultSavePlanner() if content.copies is None else StagedPlanner(content.copies)
        errors: list[str] = []
        try:
            dcp.save(content.tensors, storage_writer=writer, planner=planner, process_group=self.group)
        except (Exception, CheckpointException) as error:  # DCP wraps the errors of all ranks
            errors = [_not_saved(path, root_cause(error))]
        fail_together(errors, CheckpointError, self.group)
        return {name: entry for part in gather_objects(writer.entries, self.group) for name, entry in part.items()}

    def _stored_bytes(self, tensors: Tensors) -> int:
        """Size of a checkpoint: each tensor counts once, however many ranks hold a shard or a replica of it.

        Ranks with the same names hold the same tensors; only pipeline ranks differ. RNG states are too small to count.
        """
        names = [name for name in tensors if not name.startswith("rng.")]
        num_bytes = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
        return sum(dict(gather_objects((digest, num_bytes), self.group)).values())

    def _clear(self, path: Path, num_bytes: int) -> None:
        """Removes what a dead save left, and checks that the new one fits on the disk."""
        self.retention.wait()  # removals free space
        self.ledger.strike([step_of(path.name)])
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

    def _commit(self, path: Path, content: Content, entries: dict[str, Any]) -> StepFolder:
        write_atomic(path / RECIPE, content.recipe_toml)
        write_atomic(path / LINEAGE, content.lineage_json)
        texts = {name: file_entry(path / name) for name in (RECIPE, LINEAGE)}
        complete = replace(content.manifest, files={**entries, **texts})
        write_manifest(path, complete)
        self.ledger.enter(complete.progress.step)
        return StepFolder(path, complete)

    def close(self, most_seconds: float | None = None) -> None:
        """Waits for saves and removals to finish; a failed save is logged.

        Args:
            most_seconds: longest wait for a background save, which may itself wait for a rank that is gone. Abandoning
                it is safe: without a manifest it is not a checkpoint.
        """
        if self._thread is not None:
            with waiting_for(LAST_SAVE):
                self._thread.join(most_seconds)
            if self._thread.is_alive():
                logger.warning("a checkpoint was still being written; it is abandoned")
                return
        try:
            self.wait()
        except TitanGrowthError as error:
            logger.error("%s", error)
        except Exception:
            logger.warning("a checkpoint was not finished: another rank is gone")
        self.retention.wait()


def _as_save_error(path: Path, work: Callable[[], Result]) -> Callable[[], Result]:
    """Wraps one rank's part of a save so that any error is a CheckpointError, which all ranks raise."""

    def wrapped() -> Result:
        try:
            return work()
        except CheckpointError:
            raise
        except Exception as error:  # storage packages raise their own error types
            raise CheckpointError(_not_saved(path, root_cause(error))) from error

    return wrapped


def _not_saved(path: Path, reason: str) -> str:
    return f"{path.name} was not saved: {reason.rstrip('.')}. Earlier checkpoints are intact"


def cause_of(error: BaseException, *kinds: type[BaseException]) -> BaseException:
    """The cause of an exception that DCP wrapped: the first of the given kinds, else the deepest."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    while not isinstance(error, kinds) and (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error


def root_cause(error: BaseException) -> str:
    """The cause of an exception that DCP wrapped, in one line."""
    cause = cause_of(error, OSError, CheckpointError)
    if isinstance(cause, OSError):
        return describe_os_error(cause)
    return str(cause).strip().split("\n")[0] or type(cause).__name__
