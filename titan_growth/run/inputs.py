"""What a run reads besides its corpus, by content: so that a resumed run notices when it is something else."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from titan_growth.checkpoint.folder import open_step
from titan_growth.config.schema.recipe import Recipe
from titan_growth.data.content import ContentHashes, Markable, marked
from titan_growth.data.readers import reading
from titan_growth.data.remote import Remote, list_remote, place_of
from titan_growth.layout.schedule_csv import KEY as SCHEDULE_KEY
from titan_growth.tools.errors import CheckpointError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.location import folder_at

INITIAL_KEY = "checkpoint.initial_load_path"
_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json", ".metadata", "*.distcp")
"""The files that make a folder of weights what it is."""
_COMPARED = (
    ("tokenizer", "data.tokenizer", "tokenizer", "description"),
    ("corpus", "training.dataset", "corpus", "description"),
    ("validation", "validation.dataset_path", "validation corpus", "validation_description"),
)
"""Fingerprint, key, what it is of, and where it is described."""


def input_hashes(recipe: Recipe, hashes: ContentHashes) -> dict[str, str]:
    """Hashes of the pipeline schedule and of `checkpoint.initial_load_path`, as far as the recipe has them.

    What is missing or damaged is left out: whoever uses it reports that.

    Raises:
        DataError: when weights without a manifest cannot be read.
    """
    found = {}
    if schedule := _schedule(recipe.parallelism.pipeline_parallel_schedule_csv):
        found["schedule"] = schedule
    start = recipe.checkpoint.initial_load_path
    if recipe.checkpoint.enable and start is not None and (weights := _weights(start, hashes)):
        found["initial_weights"] = weights
    return found


def _schedule(path: str) -> str | None:
    try:
        return _short(Path(path).read_bytes()) if path else None
    except OSError:
        return None


def _weights(text: str, hashes: ContentHashes) -> str | None:
    path = folder_at(text)
    if not path.is_dir():
        return None
    try:
        folder = open_step(path)
    except CheckpointError:
        return None
    if folder is not None:  # its manifest has the hash of every file
        return _short(json.dumps(folder.manifest.files, sort_keys=True).encode())
    place = place_of(INITIAL_KEY, text)
    with reading(place):
        files: Sequence[Markable] = (
            list_remote(place).entries
            if isinstance(place, Remote)
            else [marked(file, file.name) for file in sorted(place.iterdir()) if file.is_file()]
        )
    files = [file for file in files if any(fnmatch.fnmatch(file.name, pattern) for pattern in _WEIGHTS)]
    # Of an object with a version, that is enough: reading weights once more from a store takes long.
    unversioned = [file for file in files if not file.is_versioned]
    contents = dict(zip((file.name for file in unversioned), hashes.of(text, unversioned), strict=True))
    return _short(json.dumps([(file.name, contents.get(file.name, file.mark)) for file in files]).encode())


def changes_since(before: dict[str, str], now: dict[str, str], step_name: str) -> Findings:
    """What a checkpoint's fingerprints say against going on with what the recipe names now.

    The cursor and the random states of a run mean nothing on other tokens. Another tokenizer makes other tokens of the
    same corpora, so with it they are no further problems. A fingerprint that only one side has is not compared: older
    versions wrote none of validation, weights and schedule.
    """
    found = Findings()
    for part, key, what, description in _COMPARED:
        if _differs(part, before, now):
            message = (
                f"{step_name} was trained with another {what} ({before[part]}; the recipe's is {now[part]}). "
                f"Its data was: {before.get(description, 'not known')}"
            )
            found.problem(key, message, "Use that again, or name another job.dump_folder to start a new run")
            break
    if _differs("initial_weights", before, now):
        message = f"{step_name} descends from other weights ({before['initial_weights']}; {now['initial_weights']} now)"
        hint = "Name those again, or leave the key out: the run goes on from its own checkpoint"
        found.problem(INITIAL_KEY, message, hint)
    if _differs("schedule", before, now):
        found.warnings.append(Problem(SCHEDULE_KEY, f"it is another schedule than {step_name} was trained with"))
    return found


def _differs(part: str, before: dict[str, str], now: dict[str, str]) -> bool:
    return part in before and part in now and before[part] != now[part]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
