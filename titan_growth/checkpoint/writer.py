"""Writing DCP folders: one file per rank, hashed while it is written, on any file system.

    this rank's plan -> tensors to the host, one at a time -> archive -> file; write, SHA-256 and sync overlap

The format is DCP's own, and DCP reads it. The difference is cost: a checkpoint is committed with a checksum of every
file, and reading a file back to hash it would take as long as writing it. Here hashing overlaps the write, and data is
synced as it goes instead of all at the end. torch's archives also carry a CRC-32 per tensor, which takes three times as
long as the SHA-256 that makes it redundant, so it is left out (`torch.load` ignores it; `unzip` would complain).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import Future as LocalFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from titan_growth.checkpoint.folder import METADATA
from titan_growth.tools.location import is_remote
from titan_growth.tools.torch_private import StorageInfo

_serialization: Any = config

_WORTH_A_THREAD = 1 << 20
"""Bytes above which hashing in another thread is faster."""

_PART = 64 << 20
"""Bytes of one part of a multipart upload."""

_SYNC_EVERY = 1 << 26
"""Bytes between calls of fdatasync."""


class ShardWriter(StorageWriter):
    """A DCP storage writer for one step folder.

    Args:
        folder: the step folder, which exists.
        in_background: training goes on meanwhile, so use one core.
    """

    def __init__(self, folder: Path, *, in_background: bool = False) -> None:
        self.folder = folder
        self.in_background = in_background
        self.entries: dict[str, dict[str, Any]] = {}
        """The manifest's entry of each file this rank wrote."""

    # ---- DCP's interface -----------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """No-op: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """No-op: the folder exists."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan, unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Assigns each rank its file name."""
        return [replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's tensors, one after another.

        Raises:
            OSError: if the file cannot be written.
        """
        results = []
        if plan.items:
            name: str = plan.storage_data
            with _serialization.patch("save.compute_crc32", False), self._new_file(name) as file:
                for item in plan.items:
                    assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn} is not a tensor"
                    values = planner.resolve_data(item)
                    assert isinstance(values, Tensor)
                    begin = file.position
                    with file.own_errors():
                        torch.save(_compact(values), cast(IO[bytes], file))
                    length = file.position - begin
                    results.append(WriteResult(item.index, length, StorageInfo(name, begin, length)))
            self.entries[name] = file.entry
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _new_file(self, name: str) -> HashedFile:
        return HashedFile(self.folder / name, hash_beside=not self.in_background)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes `.metadata`, on rank 0."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        metadata.storage_meta = self.storage_meta()
        with self._new_file(METADATA) as file:
            file.write(pickle.dumps(metadata))
        self.entries[METADATA] = file.entry

    def storage_meta(self) -> StorageMeta:
        """Empty: a checkpoint does not record where it was written."""
        return StorageMeta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: DCP never picks this writer by path, it is always passed in."""
        return False


class HashedFile(io.RawIOBase):
    """A new file that hashes what is written to it and is synced to disk on close.

    Args:
        hash_beside: hash large writes in another thread.

    Raises:
        OSError: from any method, if the file cannot be written.
    """

    def __init__(self, path: Path, *, hash_beside: bool = True) -> None:
        super().__init__()
        self._hash_beside = hash_beside
        # The buffer collects an archive's many small writes; large ones bypass it. A store takes a file in parts, and
        # limits their number (S3: 10,000).
        part: dict[str, Any] = {"block_size": _PART} if is_remote(path) else {"buffering": _WORTH_A_THREAD}
        self._file: Any = path.open("wb", **part)
        self._digest = hashlib.sha256()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint-write")
        self._syncing: LocalFuture[None] | None = None
        self._descriptor = _descriptor(self._file)
        self._unsynced = 0
        self._error: OSError | None = None
        self.position = 0
        """Bytes written so far."""

    def write(self, data: Any) -> int:
        """Writes all of the bytes."""
        view = memoryview(data).cast("B")
        try:
            if view.nbytes < _WORTH_A_THREAD or not self._hash_beside:
                self._digest.update(view)
                self._file.write(view)
            else:
                hashing = self._threads.submit(self._digest.update, view)
                try:
                    self._file.write(view)
                finally:
                    hashing.result()  # the caller may reuse the memory after this call
        except OSError as error:
            self._error = error
            raise
        self.position += view.nbytes
        self._unsynced += view.nbytes
        if self._unsynced >= _SYNC_EVERY and (self._syncing is None or self._syncing.done()):
            self._unsynced = 0
            if self._descriptor is not None:
                self._syncing = self._threads.submit(os.fdatasync, self._descriptor)
        return view.nbytes

    @contextlib.contextmanager
    def own_errors(self) -> Iterator[None]:
        """Restores the cause of a failed write, which torch's archive writer loses."""
        try:
            yield
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    @property
    def entry(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        return {"bytes": self.position, "sha256": self._digest.hexdigest()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._syncing is not None and error is None:
                self._syncing.result()
            if error is None:
                self._file.flush()
                if self._descriptor is not None:
                    os.fsync(self._descriptor)
                self._file.close()
        finally:
            self._threads.shutdown()
            self._give_up_file()
            self.close()

    def _give_up_file(self) -> None:
        """Drops an incomplete file. Closing it would publish it in a store."""
        if not self._file.closed and hasattr(self._file, "discard"):
            with contextlib.suppress(Exception):
                self._file.discard()
            with contextlib.suppress(AttributeError):  # otherwise garbage collection would close and upload it
                self._file.closed = True
        else:
            with contextlib.suppress(OSError):  # a full disk, already reported
                self._file.close()


def _descriptor(file: Any) -> int | None:
    """The descriptor of a local file; a remote file has none, and is durable once closed."""
    try:
        return int(file.fileno())
    except (AttributeError, OSError):
        return None


def _compact(values: Tensor) -> Tensor:
    """A host copy without the rest of its storage: `torch.save` would write all of what a view points into."""
    values = values.detach().cpu()
    return values if values.untyped_storage().nbytes() == values.numel() * values.element_size() else values.clone()
