"""Which checkpoints stay on disk.

`keep_latest_k` counts committed checkpoints up to the one just saved, on top of those taken at a growth. A valid
checkpoint is never deleted for a damaged one: checkpoints a resume passed over are set aside before training continues,
so they do not count. Rank 0 removes in the background, since deleting a checkpoint from a slow file system may take
longer than a collective's timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

from titan_growth.checkpoint.folder import MANIFEST, StepFolder
from titan_growth.checkpoint.ledger import LedgerFile
from titan_growth.checkpoint.steps import committed_steps, step_numbers, step_path
from titan_growth.liveness.waits import STORAGE, waiting_for
from titan_growth.tools.files import free_name, move_folder, remove_folder
from titan_growth.tools.location import same_place


@waiting_for(STORAGE)
def set_aside(root: Path, steps: Iterable[int], label: str) -> list[str]:
    """Renames step folders to `label-N`, in this order; returns the new names. Steps without a folder are left out."""
    moved = []
    for step in steps:
        path = step_path(root, step)
        if not path.exists():
            continue
        target = free_name(root / f"{label}-{step}")
        move_folder(path, target)
        moved.append(target.name)
    return moved


class Retention:
    """Removes old checkpoints of one folder in the background. Rank 0 only.

    Args:
        spare: never removed: the checkpoint the run started from.
    """

    def __init__(self, ledger: LedgerFile, keep_latest_k: int, spare: Path | None = None) -> None:
        self.root = ledger.root
        self.ledger = ledger
        self.spare = spare
        self.keep_latest_k = keep_latest_k
        self._remover: Thread | None = None

    def prune(self, saved_step: int) -> None:
        """Call after committing a checkpoint of `saved_step`.

        Also clears the remains of dead saves and interrupted removals of earlier steps. A step that the ledger has and
        whose manifest is lost is damage, and stays.
        """
        self.wait()
        expired: list[StepFolder] = []
        if self.keep_latest_k:
            usable = [folder for folder in committed_steps(self.root).usable if folder.step <= saved_step]
            temporary = [folder for folder in usable if not folder.manifest.permanent]
            expired = temporary[self.keep_latest_k :]
        self.ledger.strike(folder.step for folder in expired)
        for folder in expired:
            # The manifest goes first, so that a half-removed checkpoint is not a committed one.
            (folder.path / MANIFEST).unlink(missing_ok=True)
        steps = [step for step in step_numbers(self.root) if step < saved_step and step not in self.ledger.steps]
        remains = [path for path in (step_path(self.root, step) for step in steps) if self._may_go(path)]
        if remains:
            self._remover = Thread(target=_remove, args=(remains,), name="checkpoint-retention")
            self._remover.start()

    def _may_go(self, path: Path) -> bool:
        return _has_no_manifest(path) and not same_place(path, self.spare)

    def wait(self) -> None:
        """Waits for removals in progress."""
        if self._remover is not None:
            with waiting_for(STORAGE):
                self._remover.join()
            self._remover = None


def _has_no_manifest(folder: Path) -> bool:
    """Whether nothing was committed, for certain. `exists` is also False when a store does not answer."""
    try:
        (folder / MANIFEST).open("rb").close()
    except Exception as error:
        return isinstance(error, (FileNotFoundError, NotADirectoryError))
    return False


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(Exception):  # stores raise their own error types; the next save retries
            remove_folder(path)
