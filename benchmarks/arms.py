"""Runs that differ in a few words of one recipe: trained once each through `run_train.sh`, their losses as JSON."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titan_growth.metrics.curves import read_curve
from titan_growth.version import __version__

ROOT = Path(__file__).resolve().parents[1]


def validation_losses(folder: Path, recipe: Path, words: Sequence[str]) -> dict[int, float]:
    """Step -> validation loss of a run; trained unless it has been, from its start."""
    finished = folder / "trained"
    given = " ".join(words)
    if not finished.exists() or finished.read_text(encoding="utf-8") != given:
        command = [str(ROOT / "run_train.sh"), "--job.dump_folder", str(folder), "--checkpoint.start_fresh", "true"]
        environment = {**os.environ, "CONFIG_FILE": str(recipe), "NGPU": "1"}
        subprocess.run([*command, *words], env=environment, check=True)
        finished.write_text(given, encoding="utf-8")
    return {point.step: point.loss for point in read_curve(folder.name, folder).points}


def write(path: Path, command: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the runs as JSON; what a page is made of."""
    result = {"command": command, "torch": torch.__version__, "version": __version__, "runs": runs}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
