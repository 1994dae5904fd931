"""May a run start from scratch in this folder? Only when something says that no checkpoint of it was ever committed.

A run whose checkpoints are gone looks like a new one. Training anew would cost days before somebody notices. So where
there is no ledger, everything that an earlier run leaves counts against it, and `checkpoint.start_fresh` says that it
is meant. Where checkpoints are not asked for and the folder has never had any, nothing can be lost.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import tomli

from titan_growth.checkpoint.folder import root_of
from titan_growth.checkpoint.search import FROM_SCRATCH, Found
from titan_growth.checkpoint.steps import committed_steps, step_numbers, step_of
from titan_growth.config.loader import recipe_from_toml
from titan_growth.config.schema.recipe import CheckpointConfig, Recipe
from titan_growth.liveness.exit_report import NOT_FAILURES
from titan_growth.tools.errors import CheckpointError, ConfigError, Problem
from titan_growth.tools.files import is_folder
from titan_growth.tools.run_folder import METRICS_FILE, RECIPE_FILE
from titan_growth.tools.text import one_line

_SAVED = re.compile(rb"\bsaved .*/(step-[0-9]+)\s*$", re.MULTILINE)
_LOG_BYTES = 4 << 20
"""Read from the end of each log: the last save is among them."""


def earlier_recipe(folder: Path) -> Recipe | None:
    """The effective recipe of the run's last start; None when there is none.

    Raises:
        ValueError: when there is one that cannot be read.
    """
    try:
        return recipe_from_toml(tomli.loads((folder / RECIPE_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{RECIPE_FILE} cannot be read ({one_line(str(error), 200)})") from None


def require_fresh(section: CheckpointConfig, folder: Path, found: Found) -> list[str]:
    """Lines to say about a start from scratch, after a search that found no checkpoint.

    Raises:
        ConfigError: when the run has checkpoints, but not where the recipe now says.
        CheckpointError: when an earlier run may have lost its checkpoints.
    """
    root = root_of(section.folder, folder)
    if found.nothing_was_committed:
        over = "the earlier run ended before its first checkpoint was committed: it starts over"
        return [over] if next(_traces(folder), None) else []
    try:
        before = earlier_recipe(folder)
        saved_before, elsewhere = before is None or _saves(before.checkpoint), _left_elsewhere(before, section, folder)
    except ValueError:
        saved_before, elsewhere = True, ""
    if elsewhere:
        message = f"there is no checkpoint in {root}, but this run has some in {elsewhere}"
        hint = "Name that folder, or copy the newest here; another job.dump_folder starts a new run"
        raise ConfigError([Problem("checkpoint.folder", message, hint)])
    traces = [found.ledger_problem] if found.ledger_problem else []
    if not section.enable and (steps := step_numbers(root)):
        traces.append(f"{root} holds step-{steps[0]}, which is not loaded because checkpoint.enable is false")
    if saved_before:
        traces += _traces(folder)
    if traces:
        lost = "and its checkpoints are lost, or somewhere else" if section.enable else "and would be lost sight of"
        raise CheckpointError(
            f"checkpoint.folder {root}: no checkpoint to go on from, but there was a run here, {lost} "
            f"({'; '.join(traces)}). Restore them, or name their folder. {FROM_SCRATCH}"
        )
    return []


def _saves(section: CheckpointConfig) -> bool:
    return section.enable and not section.load_only


def _left_elsewhere(before: Recipe | None, section: CheckpointConfig, folder: Path) -> str:
    """The checkpoints that the run has in the folder that its recipe named before."""
    if before is None or not _saves(before.checkpoint) or before.checkpoint.folder == section.folder:
        return ""
    root = root_of(before.checkpoint.folder, folder)
    found = committed_steps(root)
    newest = [one.path.name for one in found.usable] or [one.folder for one in found.refused]
    return f"{root}, up to {newest[0]}" if newest else ""


def _traces(folder: Path) -> Iterator[str]:
    """What an earlier run has left that trained, or that saved."""
    metrics = folder / METRICS_FILE
    try:
        # What stands there and is no file was never a run's; the sink that opens it says so.
        if (found := metrics.stat()).st_size > 0 and stat.S_ISREG(found.st_mode):
            yield f"{METRICS_FILE} has its steps"
    except FileNotFoundError:
        pass
    except OSError as error:
        yield f"{METRICS_FILE} cannot be read ({error.strerror or error})"
    for path in sorted(folder.glob("exit*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(report, dict) and report.get("status") in NOT_FAILURES:
                yield f"{path.name} says that it ended well"
        except (OSError, ValueError):
            yield f"{path.name} cannot be read"
    if saved := max((name for log in _logs(folder) for name in _saved_in(log)), key=step_of, default=""):
        yield f"its logs say that it saved {saved}"


def _logs(folder: Path) -> list[Path]:
    logs = folder / "logs"
    return sorted(logs.glob("**/*.log")) if is_folder(logs) else []


def _saved_in(log: Path) -> list[str]:
    """The steps that a log says were saved."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            return [name.decode() for name in _SAVED.findall(file.read())]
    except OSError:
        return []
