"""The step folders in a checkpoint folder: which are committed, which are damaged, which were never finished."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from titan_growth.checkpoint.folder import LINEAGE, MANIFEST, RECIPE, CutOffError, StepFolder, open_step
from titan_growth.checkpoint.ledger import Ledger, read_ledger
from titan_growth.liveness.waits import STORAGE, waiting_for
from titan_growth.tools.errors import CheckpointError, RefusedCheckpointError
from titan_growth.tools.files import is_folder
from titan_growth.tools.location import is_remote, same_place

_STEP_FOLDER = re.compile("step-(0|[1-9][0-9]{0,15})")


def step_path(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step}"


def is_step_name(name: str) -> bool:
    """Whether a name is a step folder's, so not a path to somewhere else."""
    return _STEP_FOLDER.fullmatch(name) is not None


def step_of(name: str) -> int:
    """The step of a step folder's name."""
    return int(name.removeprefix("step-"))


def step_numbers(root: Path) -> list[int]:
    """The steps that have a folder, committed or not, newest first. Raises OSError when that cannot be told."""
    return _folders_in(_listed(root))


def _listed(root: Path) -> dict[int, bool]:
    """Step -> whether it is a folder, of every entry with a step folder's name."""
    if is_remote(root):
        root.fs.invalidate_cache()  # type: ignore[attr-defined]
    if not is_folder(root):
        return {}
    return {step_of(path.name): path.is_dir() for path in root.iterdir() if is_step_name(path.name)}


def _folders_in(listed: dict[int, bool]) -> list[int]:
    return sorted((step for step, is_dir in listed.items() if is_dir), reverse=True)


@dataclass(frozen=True)
class CommittedSteps:
    """What a checkpoint folder holds, newest first."""

    usable: list[StepFolder]
    refused: list[RefusedCheckpointError]
    """Damaged, or lost, or of unknown state because no ledger tells whether their saves were finished."""
    unfinished: list[RefusedCheckpointError] = field(default_factory=list)
    """Never committed, by the ledger: remains of a save or a removal that was interrupted."""
    ledger: Ledger | None = None
    """None when there is none, or when it cannot be read."""
    ledger_problem: str = ""
    """Why it cannot be read."""
    folders: list[int] = field(default_factory=list)
    """The steps that have a folder, whatever is in it."""

    @property
    def nothing_was_committed(self) -> bool:
        """Whether the ledger says that the run has never committed anything."""
        return self.ledger is not None and not self.ledger.steps and not self.usable and not self.refused


@waiting_for(STORAGE)
def committed_steps(root: Path, spare: Path | None = None) -> CommittedSteps:
    """The step folders of a run.

    Usable means that file sizes match, and checksums too for what is read before a run starts: recipe and lineage.
    Steps of the ledger are looked up by name: the listing of a store may be late.

    Args:
        spare: another program's step folder among them, which need not have a manifest.
    """
    ledger, ledger_problem = None, ""
    try:
        ledger = read_ledger(root)
    except CheckpointError as error:
        ledger_problem = str(error)
    listed = _listed(root)
    found = CommittedSteps([], [], [], ledger, ledger_problem, _folders_in(listed))
    for step in sorted(listed.keys() | set(ledger.steps if ledger is not None else ()), reverse=True):
        path = step_path(root, step)
        try:
            folder, why = open_step(path), ""
        except CutOffError as error:
            folder, why = None, error.reason
        except RefusedCheckpointError as error:
            found.refused.append(error)
            continue
        if folder is not None:
            _judge(folder, step, found)
        elif not same_place(path, spare):
            _judge_uncommitted(path, why or _what_is_missing(path), found)
    return found


def _judge(folder: StepFolder, step: int, found: CommittedSteps) -> None:
    damage = f"its manifest is for step {folder.step}" if folder.step != step else None
    damage = damage or folder.damage(checksums=False) or folder.damage(checksums=True, names=(RECIPE, LINEAGE))
    if damage:
        found.refused.append(RefusedCheckpointError(folder.path.name, damage))
    else:
        found.usable.append(folder)


def _judge_uncommitted(path: Path, why: str, found: CommittedSteps) -> None:
    """A step without a usable manifest: lost if the ledger has it, unfinished if not, unknown without a ledger."""
    if found.ledger is None:
        unknown = found.ledger_problem or "there is no ledger.json"
        why = f"{why}, and whether it was ever committed cannot be told: {unknown}"
        found.refused.append(RefusedCheckpointError(path.name, why))
    elif step_of(path.name) in found.ledger.steps:
        found.refused.append(RefusedCheckpointError(path.name, f"{why}, though the ledger lists it"))
    else:
        found.unfinished.append(RefusedCheckpointError(path.name, f"{why}, and by the ledger it was never committed"))


def _what_is_missing(path: Path) -> str:
    if path.is_dir():
        return f"it has no {MANIFEST}"
    return "it is not a folder" if path.exists() else "its folder is gone"
