"""Step folders, without torch.

A checkpoint is committed once `manifest.json`, written last, exists and matches the files: sizes always, SHA-256 before
a load. Nothing depends on atomic renames. Whether a folder without a manifest was ever committed, the ledger tells
(`ledger.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_growth.checkpoint.history import Lineage, RollBack
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.untrusted.files import (
    MAX_METADATA_BYTES,
    MAX_TEXT_BYTES,
    open_plain,
    read_plain,
    size_of_file,
    text_of,
)
from titan_growth.checkpoint.untrusted.json_types import table_of_json, table_of_toml
from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.liveness.waits import STORAGE, waiting_for
from titan_growth.tools.errors import RefusedCheckpointError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.location import folder_at, is_remote

MANIFEST, METADATA, RECIPE, LINEAGE = "manifest.json", ".metadata", "recipe.toml", "lineage.json"
_MAX_BYTES = {RECIPE: 1 << 20, LINEAGE: MAX_TEXT_BYTES, METADATA: MAX_METADATA_BYTES}


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
        """Size of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest.files.values())

    def refused(self, reason: str) -> RefusedCheckpointError:
        """The error that refuses this checkpoint."""
        return RefusedCheckpointError(self.path.name, reason)

    def recipe_table(self) -> dict[str, Any]:
        """The recipe the checkpoint was written with. Raises RefusedCheckpointError if it cannot be read."""
        with self._reading("recipe"):
            return table_of_toml(read_plain(self.path / RECIPE, _MAX_BYTES[RECIPE]))

    def lineage(self) -> Lineage:
        """The growths that led to the checkpoint. Raises RefusedCheckpointError if it cannot be read."""
        with self._reading("lineage"):
            lineage = Lineage.from_dict(table_of_json(read_plain(self.path / LINEAGE)))
        if self.manifest.roll_back is None:
            return lineage
        return replace(lineage, roll_backs=(*lineage.roll_backs, RollBack(**self.manifest.roll_back)))

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RefusedError) as error:
            raise self.refused(f"its {what} cannot be read ({error})") from None

    @waiting_for(STORAGE)
    def damage(
        self, *, checksums: bool, share: tuple[int, int] = (0, 1), names: Collection[str] | None = None
    ) -> str | None:
        """What is wrong with the files, or None.

        Args:
            checksums: also compare SHA-256, which reads every file.
            share: (rank, number of ranks); each rank checks its share of the files.
            names: check only these files.
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


class CutOffError(RefusedCheckpointError):
    """The manifest is empty or ends in the middle, as a process leaves it that died while writing it."""


def open_step(path: Path) -> StepFolder | None:
    """The committed checkpoint in a folder, or None if it has no manifest.

    Raises:
        CutOffError: if the manifest is not whole.
        RefusedCheckpointError: if there is a manifest that cannot be used.
    """
    try:
        text = text_of(path / MANIFEST)
    except RefusedError as error:
        raise RefusedCheckpointError(path.name, f"{MANIFEST} cannot be read ({error})") from None
    if text is None:
        return None
    if not text.rstrip().endswith("}"):
        raise CutOffError(path.name, f"{MANIFEST} {'ends in the middle' if text.strip() else 'is empty'}")
    try:
        return StepFolder(path, Manifest.from_json(text))
    except RefusedError as error:
        raise RefusedCheckpointError(path.name, f"{MANIFEST} is not valid ({error})") from None


def root_of(folder: str, dump_folder: Path) -> Path:
    """The parent of a run's step folders: `checkpoint.folder`, a URL or a path inside the run folder.

    Raises:
        LocationError: if the URL cannot be used.
    """
    return folder_at(folder) if is_remote(folder) else dump_folder / folder


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Commits a checkpoint."""
    write_atomic(path / MANIFEST, manifest.to_json())


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open_plain(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
