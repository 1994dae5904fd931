"""What a folder looks like that is no committed checkpoint, and which command takes it."""

from __future__ import annotations

from pathlib import Path

from titan_growth.checkpoint.folder import LINEAGE, MANIFEST, METADATA, RECIPE
from titan_growth.checkpoint.ledger import LEDGER
from titan_growth.checkpoint.steps import step_numbers, step_path
from titan_growth.interchange.folder import is_hugging_face
from titan_growth.tools.files import is_folder
from titan_growth.tools.text import one_line


def is_foreign(path: Path) -> bool:
    """Whether a folder is a DCP folder without a manifest and anything else of ours, such as torchtitan's."""
    ours = (path / MANIFEST, path / RECIPE, path / LINEAGE, path.parent / LEDGER)
    return (path / METADATA).is_file() and not any(one.exists() for one in ours)


def described(path: Path) -> str:
    """What is in a folder without a manifest, and what to do with it."""
    for root in (path, path / "checkpoint"):
        if newest := next((step for step in step_numbers(root) if (step_path(root, step) / MANIFEST).is_file()), None):
            what = "a folder of checkpoints" if root == path else "the folder of a run"
            return f"it is {what}. Name one of its checkpoints; the newest is {step_path(root, newest)}"
    if is_foreign(path):
        return (
            "it has no manifest, and nothing else of ours: a DCP folder of another program, such as torchtitan. Give "
            "--recipe FILE, a recipe with its model in [model]; a run starts from it with checkpoint.initial_load_path"
        )
    if steps := [step for step in step_numbers(path) if is_foreign(step_path(path, step))]:
        where = step_path(path, steps[0])
        return f"it is a folder of DCP folders of another program, such as torchtitan. Name one, such as {where}"
    if is_hugging_face(path):
        return (
            "it is a Hugging Face folder. grow and import take it, and so does checkpoint.initial_load_path; import "
            "makes a step folder of it"
        )
    if (path / METADATA).is_file():
        return "it has no manifest, so it was never committed: its save was not finished, or the manifest was lost"
    if not is_folder(path) or not any(path.iterdir()):
        return "it has no manifest, and nothing else, so it was never committed. Name a step-N folder"
    names = sorted(one.name for one in path.iterdir())
    return (
        f"it has no manifest and no {METADATA}, so it was never committed, and is no checkpoint of another program "
        f"(it has {one_line(', '.join(names[:3]), 100)}). Name a step-N folder"
    )
