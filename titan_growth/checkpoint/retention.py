"""Which checkpoints stay on the disk.

`keep_latest_k` counts committed checkpoints up to the one just saved; those taken at a growth stay besides. Nothing
good is ever removed to make room for something damaged: checkpoints that a resume has passed over are moved out of the
way before the run goes on, so they take no place among those that count. All of this is rank 0's work, and nobody waits
for it: a slow file system may take longer to delete a checkpoint than a collective may take.
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
    """Renames every committed checkpoint of a later step to `label-N`; returns the new names."""
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
    """Removes old checkpoints of one folder, in the background. Used on rank 0 only.

    Args:
        spare: a folder that is not ours to remove: what the run was started from.
    """

    def __init__(self, root: Path, keep_latest_k: int, spare: Path | None = None) -> None:
        self.root = root
        self.spare = spare
        self.keep_latest_k = keep_latest_k
        self._remover: Thread | None = None

    def prune(self, saved_step: int) -> None:
        """Call it after a checkpoint of `saved_step` has been committed.

        Also clears what dead saves and interrupted removals of earlier steps have left.
        """
        self.wait()
        doomed = []
        if self.keep_latest_k:
            usable = [folder for folder in committed_steps(self.root).usable if folder.step <= saved_step]
            passing = [folder for folder in usable if not folder.manifest.permanent]
            doomed = [folder.path for folder in passing[self.keep_latest_k :]]
        for path in doomed:
            # The manifest goes first: a half-removed checkpoint is then not a committed one.
            (path / MANIFEST).unlink(missing_ok=True)
        earlier = [step_path(self.root, step) for step in step_numbers(self.root) if step < saved_step]
        remains = [path for path in earlier if path != self.spare and _has_no_manifest(path)]
        if remains:
            self._remover = Thread(target=_remove, args=(remains,), name="checkpoint-retention")
            self._remover.start()

    def wait(self) -> None:
        """Returns when nothing is being removed any more."""
        if self._remover is not None:
            with waiting_for(STORAGE):
                self._remover.join()
            self._remover = None


def _has_no_manifest(folder: Path) -> bool:
    """Whether it is certain that nothing was committed. `exists` says no as well when a store does not answer."""
    try:
        (folder / MANIFEST).open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except Exception:
        return False
    return False


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(Exception):  # stores have errors of their own; the next save tries again
            remove_folder(path)
