"""Step folders and their manifests, without torch.

A checkpoint is committed when its `manifest.json`, written last, is there and fits the files: sizes always, and SHA-256
sums before a load. No rename is relied on. Whatever is not committed does not exist for a resume; whatever is committed
and damaged is named, and the next older one is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from titan_growth.checkpoint.history import Lineage, Progress, RollBack, StabilityState
from titan_growth.checkpoint.untrusted.files import (
    MAX_METADATA_BYTES,
    MAX_TEXT_BYTES,
    is_plain_name,
    open_plain,
    read_plain,
    size_of_file,
)
from titan_growth.checkpoint.untrusted.json_types import (
    STRICT,
    Count,
    Number,
    Size,
    Text,
    from_json,
    table_of_json,
    table_of_toml,
)
from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.liveness.waits import STORAGE, waiting_for
from titan_growth.tools.errors import RefusedCheckpointError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.location import folder_at, is_remote

FORMAT = 1
MANIFEST, METADATA, RECIPE, LINEAGE = "manifest.json", ".metadata", "recipe.toml", "lineage.json"
_SEAL = "sha256"
"""Key of the manifest's checksum of itself."""
_MAX_BYTES = {RECIPE: 1 << 20, LINEAGE: MAX_TEXT_BYTES, METADATA: MAX_METADATA_BYTES}
_STEP_FOLDER = re.compile("step-(0|[1-9][0-9]{0,15})")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    __pydantic_config__ = STRICT

    progress: Progress
    num_layers: Count
    num_ranks: Count
    mesh: Text
    model_only: bool
    permanent: bool
    """Kept by retention: taken at a growth."""
    metrics_offset: Size
    """Bytes of metrics.jsonl when the checkpoint was taken; a resume cuts the file back to it."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Wall-clock of the run's loop when the checkpoint was taken, over all processes that led to it."""
    held_out_loss: Number | None = None
    """Of one fixed batch, when the model grows from here: the growth then needs the small model itself no more."""
    roll_back: dict[str, Any] | None = None
    """The growth from this checkpoint that the watchdog has taken back (`lineage.RollBack`)."""
    recent_losses: list[Number] = field(default_factory=list)
    """The last training losses, when a growth depends on their slope."""
    stability: dict[str, Any] = field(default_factory=dict)
    """What `titan_growth.run.stability` goes by (`lineage.StabilityState`)."""
    data: dict[str, Text] = field(default_factory=dict)
    """Fingerprints of corpus and tokenizer."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> {"bytes": n, "sha256": hex} of every file of the checkpoint but the manifest."""

    def to_json(self) -> str:
        table = asdict(self)
        return sealed({"format": FORMAT, **table.pop("progress"), **table})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises RefusedError when it is not a manifest."""
        table = table_of_json(text)
        if not isinstance(table, dict) or "format" not in table:
            raise RefusedError("it has no 'format'")
        if table.pop("format") != FORMAT:
            raise RefusedError("written by another version")
        seal = table.pop(_SEAL, None)  # the first manifests had none
        if seal is not None and seal != _digest({"format": FORMAT, **table}):
            raise RefusedError("it does not match its own checksum")
        counters = ("step", "tokens", "flops", "samples")
        if missing := [key for key in (*counters, "files") if key not in table]:
            raise RefusedError(f"it has no '{missing[0]}'")
        progress = {key: table.pop(key) for key in counters}
        manifest = from_json(cls, json.dumps({**table, "progress": progress}))
        for name, entry in manifest.files.items():
            if not is_plain_name(name):
                raise RefusedError(f"names a file outside its folder: {name[:300]!r}")
            if entry.keys() != {"bytes", "sha256"} or not _is_entry(entry["bytes"], entry["sha256"]):
                raise RefusedError(f"does not say the size and the checksum of {name}")
        if manifest.roll_back is not None:
            from_json(RollBack, json.dumps(manifest.roll_back))
        from_json(StabilityState, json.dumps(manifest.stability))
        return manifest


def sealed(table: dict[str, Any]) -> str:
    """The text of a manifest: the table, and a checksum of it.

    The other checksums are in the manifest, so its own has to be there as well: a bit that flips in the data cursor
    would otherwise send a run on over other data.
    """
    table = {key: value for key, value in table.items() if key != _SEAL}
    return json.dumps({**table, _SEAL: _digest(table)}, indent=1) + "\n"


def _digest(table: dict[str, Any]) -> str:
    """SHA-256 of what a table says, however it is written down."""
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_entry(num_bytes: Any, sha256: Any) -> bool:
    return type(num_bytes) is int and 0 <= num_bytes < 1 << 63 and type(sha256) is str and len(sha256) <= 64


@dataclass(frozen=True)
class StepFolder:
    """A committed checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.progress.step

    @property
    def num_bytes(self) -> int:
        """Of all its files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest.files.values())

    def refused(self, reason: str) -> RefusedCheckpointError:
        """The error for a checkpoint that is not loaded."""
        return RefusedCheckpointError(self.path.name, reason)

    def recipe_table(self) -> dict[str, Any]:
        """The recipe the checkpoint was written with.

        Raises:
            RefusedCheckpointError: when it cannot be read.
        """
        try:
            return table_of_toml(read_plain(self.path / RECIPE, _MAX_BYTES[RECIPE]))
        except (OSError, RefusedError) as error:
            raise self.refused(f"its recipe cannot be read ({error})") from None

    def lineage(self) -> Lineage:
        """The growths behind the checkpoint.

        Raises:
            RefusedCheckpointError: when it cannot be read.
        """
        try:
            lineage = Lineage.from_dict(table_of_json(read_plain(self.path / LINEAGE)))
        except (OSError, RefusedError) as error:
            raise self.refused(f"its lineage cannot be read ({error})") from None
        if self.manifest.roll_back is None:
            return lineage
        return replace(lineage, roll_backs=(*lineage.roll_backs, RollBack(**self.manifest.roll_back)))

    @waiting_for(STORAGE)
    def damage(
        self, *, checksums: bool, share: tuple[int, int] = (0, 1), names: Collection[str] | None = None
    ) -> str | None:
        """What is wrong with the files, or None.

        Args:
            checksums: also read the files and compare SHA-256 sums.
            share: (rank, number of ranks) that divide the files among them.
            names: look at these files only.
        """
        for position, (name, entry) in enumerate(sorted(self.manifest.files.items())):
            if position % share[1] != share[0] or (names is not None and name not in names):
                continue
            path = self.path / name
            try:
                size = size_of_file(path)
                if size is None:
                    return f"{name} is missing"
                if size > _MAX_BYTES.get(name, size):
                    return f"{name} has more than {_MAX_BYTES[name]:,} bytes"
                if size != entry["bytes"]:
                    return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
                if checksums and sha256_of(path) != entry["sha256"]:
                    return f"{name} does not match its checksum"
            except RefusedError as error:
                return str(error)
            except OSError as error:
                return f"{name} cannot be read ({error.strerror or error})"
        return None


def open_step(path: Path) -> StepFolder | None:
    """The committed checkpoint in a folder, or None when nothing was committed there.

    Raises:
        RefusedCheckpointError: when there is a manifest but it cannot be used.
    """
    try:
        text = read_plain(path / MANIFEST).decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, RefusedError) as error:
        raise RefusedCheckpointError(path.name, f"{MANIFEST} cannot be read ({error})") from None
    if not text.endswith("}\n"):
        return None  # the process died while writing it: not committed
    try:
        return StepFolder(path, Manifest.from_json(text))
    except RefusedError as error:
        raise RefusedCheckpointError(path.name, f"{MANIFEST} is not valid ({error})") from None


def root_of(folder: str, dump_folder: Path) -> Path:
    """Where a run's step folders are: `checkpoint.folder`, inside the run's folder or a URL.

    Raises:
        LocationError: when it is a URL that cannot be used.
    """
    return folder_at(folder) if is_remote(folder) else dump_folder / folder


def step_path(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step}"


def is_step_name(name: str) -> bool:
    """Whether a name is that of a step folder: nothing that leads elsewhere."""
    return _STEP_FOLDER.fullmatch(name) is not None


def step_numbers(root: Path) -> list[int]:
    """Steps that have a folder, committed or not, newest first."""
    if is_remote(root):
        root.fs.invalidate_cache()  # type: ignore[attr-defined]
    if not root.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


@dataclass(frozen=True)
class CommittedSteps:
    """The committed checkpoints of a run, newest first."""

    usable: list[StepFolder]
    refused: list[RefusedCheckpointError]


@waiting_for(STORAGE)
def committed_steps(root: Path) -> CommittedSteps:
    """The committed checkpoints in a folder; usable are those with whole files.

    Whole means that sizes are right, and so is the content of what is read before a run starts: recipe and lineage.
    """
    usable: list[StepFolder] = []
    refused: list[RefusedCheckpointError] = []
    for step in step_numbers(root):
        try:
            folder = open_step(step_path(root, step))
        except RefusedCheckpointError as error:
            refused.append(error)
            continue
        if folder is None:
            continue
        damage = f"its manifest is that of step {folder.step}" if folder.step != step else None
        damage = damage or folder.damage(checksums=False) or folder.damage(checksums=True, names=(RECIPE, LINEAGE))
        if damage:
            refused.append(folder.refused(damage))
        else:
            usable.append(folder)
    return CommittedSteps(usable, refused)


def no_such_step(root: Path, step: int, refused: Sequence[RefusedCheckpointError]) -> str:
    """The message for a `checkpoint.load_step` that cannot be had."""
    why = next((str(error) for error in refused if error.folder == f"step-{step}"), "")
    there = ", ".join(f"step-{found}" for found in step_numbers(root)) or "no checkpoint"
    return f"there is no usable step-{step} in {root}{f' ({why})' if why else ''}; it holds {there}"


def none_usable(root: Path, refused: Sequence[RefusedCheckpointError]) -> str:
    """The message for a run whose checkpoints are all damaged."""
    return (
        f"{root} holds checkpoints, but none can be used: {'; '.join(map(str, refused))}. "
        "Restore one, or name another job.dump_folder to start from scratch"
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Commits a checkpoint."""
    write_atomic(path / MANIFEST, manifest.to_json())


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open_plain(path) as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
