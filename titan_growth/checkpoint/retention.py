"""Which checkpoints stay on disk.

`keep_latest_k` counts committed checkpoints up to the one just saved, on top of those taken at a growth. A valid
checkpoint is never deleted for a damaged one: checkpoints a resume passed over are set aside before training continues,
so they do not count. Rank 0 removes in the background, since deleting a checkpoint from a slow file system may take
longer than a collective's timeout.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from threading import Thread

from titan_growth.checkpoint.folder import MANIFEST, committed_steps, step_numbers, step_path
from titan_growth.liveness.waits import STORAGE, waiting_for
from titan_growth.tools.files import move_folder, remove_folder


@waiting_for(STORAGE)
def set_aside_after(root: Path, step: int, label: str) -> list[str]:
    """Renames every committed checkpoint after `step` to `label-N`; returns the new names."""
    moved = []
    for later in step_numbers(root):
        path = step_path(root, later)
        if later > step and (path / MANIFEST).exists():
            target, number = root / f"{label}-{later}", 1
            while target.exists():
                number += 1
                target = root / f"{label}-{later}-{number}"
            move_folder(path, target)
            moved.append(target.name)
    return moved


class Retention:
    """Removes old checkpoints of one folder in the background. Rank 0 only.

    Args:
        spare: never removed: the checkpoint the run started from.
    """

    def __init__(self, root: Path, keep_latest_k: int, spare: Path | None = None) -> None:
        self.root = root
        self.spare = spare
        self.keep_latest_k = keep_latest_k
        self._remover: Thread | None = None

    def prune(self, saved_step: int) -> None:
        """Call after committing a checkpoint of `saved_step`.

        Also clears the remains of dead saves and interrupted removals of earlier steps.
        """
        self.wait()
        expired = []
        if self.keep_latest_k:
            usable = [folder for folder in committed_steps(self.root).usable if folder.step <= saved_step]
            temporary = [folder for folder in usable if not folder.manifest.permanent]
            expired = [folder.path for folder in temporary[self.keep_latest_k :]]
        for path in expired:
            # The manifest goes first, so that a half-removed checkpoint is not a committed one.
            (path / MANIFEST).unlink(missing_ok=True)
        earlier = [step_path(self.root, step) for step in step_numbers(self.root) if step < saved_step]
        remains = [path for path in earlier if path != self.spare and _has_no_manifest(path)]
        if remains:
            self._remover = Thread(target=_remove, args=(remains,), name="checkpoint-retention")
            self._remover.start()

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
