"""A candidate's run: its folder, with the checkpoint linked into it, and the launcher that trains it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_growth.checkpoint.folder import LINEAGE, MANIFEST, RECIPE
from titan_growth.checkpoint.history import Lineage
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.steps import step_path
from titan_growth.commands.probe.candidates import Candidate, candidate_recipe
from titan_growth.commands.probe.report import Outcome, outcome_of
from titan_growth.commands.source import Source, open_source
from titan_growth.commands.target import commit, require_new
from titan_growth.config.loader import load_recipe, to_toml, with_values
from titan_growth.config.schema.recipe import Recipe
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import model_config_of
from titan_growth.run.plan import ResumePoint, plan_run
from titan_growth.tools.device import present_device_type
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.run_folder import METRICS_FILE

NOT_PASSED_ON = ("COMM_MODE", "LOG_RANK", "CONFIG_FILE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Settings of `run_train.sh` that do not apply: a probe runs on one machine."""


@dataclass(frozen=True)
class ProbeRun:
    """A candidate ready to start."""

    name: str
    folder: Path
    checkpoints: Path
    model: DecoderConfig

    @property
    def recipe_file(self) -> Path:
        """The recipe to start it with."""
        return self.folder / "probe.toml"


def prepared(
    source: Source,
    candidate: Candidate,
    folder: Path,
    *,
    steps: int,
    num_ranks: int,
    keys: Sequence[str],
    plugins: Sequence[str],
) -> ProbeRun:
    """Makes the folder of a candidate's run.

    Args:
        folder: does not exist yet.
        keys: recipe keys of the command line.
        plugins: loaded besides those of the recipe.

    Raises:
        ConfigError: when the recipe does not fit the number of ranks, or the keys are wrong.
    """
    folder.mkdir()
    recipe = candidate_recipe(source, candidate, steps, plugins)
    recipe = with_values(recipe, {"job.dump_folder": str(folder.resolve()), "checkpoint.folder": "checkpoint"})
    config = model_config_of(recipe.model, found := Findings())
    assert config is not None, found.problems
    run = ProbeRun(candidate.name, folder, folder / "checkpoint", config)
    run.recipe_file.write_text(to_toml(recipe), encoding="utf-8")
    recipe = load_recipe(["--job.config_file", str(run.recipe_file), *keys])
    manifest = source.folder.manifest
    if candidate.planned is None:
        manifest = replace(manifest, held_out_loss=None)
    point = ResumePoint(manifest.progress, len(source.lineage.events), grows_at_once=manifest.held_out_loss is not None)
    plan_run(recipe, found := Findings(), num_ranks=num_ranks, device_type=present_device_type(), resume=point)
    if found.problems:
        raise ConfigError([Problem(f"'{candidate.name}' {one.key}", one.message, one.hint) for one in found.problems])
    linked(source, manifest, step_path(run.checkpoints, manifest.progress.step), recipe)
    return run


def linked(source: Source, manifest: Manifest, target: Path, recipe: Recipe) -> None:
    """Copies a checkpoint, with another recipe; shards are hard links, or copies on another file system.

    So its own run may remove the checkpoint meanwhile. Rolled-back growths are left out: they would postpone the one
    to try.
    """
    target.mkdir(parents=True)
    for name in manifest.files:
        if name in (RECIPE, LINEAGE, MANIFEST):
            continue
        shard = (source.folder.path / name).resolve()
        try:
            os.link(shard, target / name)
        except OSError:
            shutil.copyfile(shard, target / name)  # a symbolic link would be refused: it leaves the checkpoint
    fresh: dict[str, Any] = {"roll_back": None, "metrics_offset": 0, "permanent": False}
    lineage = Lineage(source.lineage.events, source.lineage.ancestors)
    commit(target, recipe, lineage, replace(manifest, **fresh), manifest.files)


def settled(foreign: Source, folder: Path, steps: int, num_ranks: int, keys: Sequence[str]) -> Source:
    """A checkpoint with moments of weights that have none: trains them by their recipe, from its first step on.

    Args:
        folder: of the run; does not exist yet.

    Raises:
        ConfigError: when the run cannot be started with the recipe, or does not reach its end.
    """
    folder.mkdir()
    scheduler = foreign.recipe.lr_scheduler
    values: dict[str, Any] = {
        "job.dump_folder": str(folder.resolve()),
        "training.steps": steps,
        "checkpoint": {"enable": True, "interval": steps, "initial_load_path": str(foreign.folder.path.resolve())},
        "profiling": {},
    }
    if scheduler.total is None and scheduler.total_steps is None:
        values["lr_scheduler.total_steps"] = max(foreign.recipe.training.steps, steps)
    recipe_file = folder / "probe.toml"
    recipe_file.write_text(to_toml(with_values(foreign.recipe, values)), encoding="utf-8")
    if failure := _launched(recipe_file, num_ranks, keys):
        raise ConfigError([Problem("--recipe", f"its run does not get to step {steps}: {failure}")])
    return open_source(step_path(folder / "checkpoint", steps))


def carried_out(source: Source, run: ProbeRun, num_ranks: int, keys: Sequence[str]) -> Outcome:
    """Trains a candidate and removes its checkpoints."""
    failure = _launched(run.recipe_file, num_ranks, keys)
    try:
        lines = [json.loads(line) for line in (run.folder / METRICS_FILE).read_text().splitlines()]
    except (OSError, ValueError):
        lines = []
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return outcome_of(run.name, run.model, lines, source.folder.manifest, failure)


def _launched(recipe_file: Path, num_ranks: int, keys: Sequence[str]) -> str:
    """Runs a recipe to its end, with a log beside it. Returns why that failed, or nothing.

    The launcher has a session of its own: when the probe is interrupted, it is terminated and waited for.
    """
    command = [sys.executable, "-m", "titan_growth", "launch", "--job.config_file", str(recipe_file), *keys]
    environ = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    environ["NGPU"] = str(num_ranks)
    with open(recipe_file.with_name("probe.log"), "w+b") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        log.seek(0)
        output = log.read().decode(errors="replace").strip().splitlines() or [f"status {status}"]
    return "" if status == 0 else next((line for line in reversed(output) if "error: " in line), output[-1])


@contextlib.contextmanager
def work_folder(wanted: str | None, source: Source) -> Iterator[Path]:
    """A folder for the runs: the one asked for, which stays, or one beside the checkpoint, which goes if all is well.

    Raises:
        ConfigError: when the folder asked for cannot be used.
    """
    step_folder = source.folder.path.resolve()
    if wanted is not None:
        folder = Path(wanted)
        require_new(folder, step_folder)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        try:
            folder = Path(tempfile.mkdtemp(prefix="probe-", dir=step_folder.parent))
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="titan_growth-probe-"))
    try:
        yield folder
    except BaseException as error:
        if wanted is None:
            shutil.rmtree(folder, ignore_errors=True)
        # Logs and metrics of runs that were started stay; after a ConfigError there are none.
        for path in folder.glob("*" if isinstance(error, ConfigError) else "*/checkpoint"):
            shutil.rmtree(path, ignore_errors=True)
        raise
