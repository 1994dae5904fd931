"""The way of the recipe: which functions are handed a whole `Recipe` between the start of a rank and its first step.

    python -m tests.recipe_way [keys of a recipe]

trains one step of a tiny model, and prints each such function once, in the order of their first calls. A function that
only needs a section is handed the section, so the list stays short (docs/composition.md, "How a run starts").
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import titan_growth
from tests.runs import BASE, argv_of, write_corpus
from titan_growth import train
from titan_growth.config.loader import load_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.liveness.exit_report import ExitReport
from titan_growth.tools.logs import setup_logging
from titan_growth.tools.run_folder import RunFolder

PACKAGE = str(Path(titan_growth.__file__).parent) + "/"


def way_of(recipe: Recipe) -> list[str]:
    """Trains a recipe in this process, and returns `file:function` of each function that got a recipe on the way."""
    found: dict[str, None] = {}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name == "<lambda>":
            return
        if code.co_name == "forward_backward":
            sys.setprofile(None)
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(isinstance(frame.f_locals.get(name), Recipe) for name in names):
            found.setdefault(f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_name}")

    folder = RunFolder(recipe.job.dump_folder)
    sys.setprofile(watch)
    try:
        train.run(recipe, folder, ExitReport(folder.path, 0))
    finally:
        sys.setprofile(None)
    return list(found)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name) / "corpus.txt")
        values = {
            **BASE,
            "training.steps": 1,
            "lr_scheduler.warmup_steps": 1,
            "training.dataset_path": str(corpus),
            "job.dump_folder": f"{name}/run",
        }
        setup_logging(1)  # only warnings
        recipe = load_recipe([*argv_of(values), *sys.argv[1:]])
        print("\n".join(way_of(recipe)))


if __name__ == "__main__":
    main()
