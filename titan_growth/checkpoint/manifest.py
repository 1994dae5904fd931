"""`manifest.json`: what a step folder holds, the size and SHA-256 of each file, and a checksum of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from titan_growth.checkpoint.history import Progress, RollBack, StabilityState
from titan_growth.checkpoint.untrusted.files import is_plain_name
from titan_growth.checkpoint.untrusted.json_types import STRICT, Count, Number, Size, Text, from_json, table_of_json
from titan_growth.checkpoint.untrusted.pickles import RefusedError
from titan_growth.tools.sealed import SEAL, seal_of, sealed

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    __pydantic_config__ = STRICT

    progress: Progress
    num_layers: Count
    num_ranks: Count
    mesh: Text
    model_only: bool
    permanent: bool
    """Exempt from retention: a model grew from it."""
    metrics_offset: Size
    """Size of metrics.jsonl at the save; a resume truncates the file to it."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Wall-clock of the training loop until the save, over all processes of the run."""
    held_out_loss: Number | None = None
    """On one fixed batch, if the model grows from here; the growth then no longer needs the small model."""
    roll_back: dict[str, Any] | None = None
    """A growth from this checkpoint that the watchdog rolled back (`history.RollBack`)."""
    recent_losses: list[Number] = field(default_factory=list)
    """The last training losses, if a growth depends on their slope."""
    stability: dict[str, Any] = field(default_factory=dict)
    """State of `titan_growth.run.stability` (`history.StabilityState`)."""
    data: dict[str, Text] = field(default_factory=dict)
    """Fingerprints of corpus and tokenizer."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> {"bytes": n, "sha256": hex}, for every file but the manifest."""

    def to_json(self) -> str:
        table = asdict(self)
        return sealed({"format": FORMAT, **table.pop("progress"), **table})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises RefusedError if it is not a manifest."""
        table = unsealed(table_of_json(text))
        if table.pop("format") != FORMAT:
            raise RefusedError("written by another version")
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


def unsealed(table: Any) -> dict[str, Any]:
    """A parsed table without its checksum. Raises RefusedError if it was changed, or is no such table."""
    if not isinstance(table, dict) or "format" not in table:
        raise RefusedError("it has no 'format'")
    seal = table.pop(SEAL, None)  # the first manifests had none
    if seal is not None and seal != seal_of(table):
        raise RefusedError("it does not match its own checksum")
    return table


def _is_entry(num_bytes: Any, sha256: Any) -> bool:
    return type(num_bytes) is int and 0 <= num_bytes < 1 << 63 and type(sha256) is str and len(sha256) <= 64
