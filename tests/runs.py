"""Small runs for tests: a recipe, and training it in this process on forked ranks through the real entry's pieces."""

from __future__ import annotations

import contextlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from titan_growth.checkpoint.history import Lineage, Progress
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.liveness.stop_signal import StopSignal
from titan_growth.metrics.records import MEASURED
from titan_growth.run.data import prepare_run_data
from titan_growth.run.start import RunStart, Site, resolve
from titan_growth.session import Session
from titan_growth.tools.collectives import on_rank0
from titan_growth.tools.device import Device
from titan_growth.tools.findings import Findings
from titan_growth.tools.run_folder import RunFolder

BASE = {
    "model.flavor": "custom",
    "model.dim": 32,
    "model.n_layers": 4,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.vocab_size": 258,
    "data.tokenizer": "bytes",
    "data.validation_fraction": 0.05,
    "training.seq_len": 32,
    "training.global_batch_size": 8,
    "training.local_batch_size": 2,
    "training.steps": 6,
    "training.mixed_precision_param": "float32",
    "optimizer.lr": 1e-2,
    "lr_scheduler.warmup_steps": 2,
    "validation.steps": 4,
    "metrics.log_freq": 1,
    "activation_checkpoint.mode": "none",
    "debug.seed": 7,
}
"""A recipe small enough for a step in milliseconds."""

WORDS = ["the", "model", "grows", "from", "a", "few", "layers", "into", "many", "and", "goes", "on", "learning"]


def write_corpus(path: Path, num_words: int = 20_000) -> Path:
    """A text file with some structure to learn."""
    generator = random.Random(0)
    text = " ".join(generator.choice(WORDS) for _ in range(num_words))
    path.write_text(text)
    return path


def write_documents(path: Path, num_documents: int = 4000) -> Path:
    """The same words in documents of 1 to 8 words: most sequences hold several, and some documents are cut."""
    generator = random.Random(0)
    documents = [" ".join(generator.choices(WORDS, k=generator.randint(1, 8))) for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def argv_of(values: dict[str, Any]) -> list[str]:
    """Recipe values as command-line words."""
    words = []
    for key, value in values.items():
        text = str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else json.dumps(value)
        words += [f"--{key}", text]
    return words


def make_recipe(folder: Path, **overrides: Any) -> Recipe:
    """The base recipe with changes; keys are written with __ for the dot. Masked documents get short ones."""
    masked = overrides.get("data__document_mask", False)
    corpus = folder.parent / ("documents.jsonl" if masked else "corpus.txt")
    if not corpus.exists():
        (write_documents if masked else write_corpus)(corpus)
    values = {**BASE, "job.dump_folder": str(folder), "training.dataset_path": str(corpus)}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    recipe = inspect_recipe(argv_of(values), found := Findings())
    assert recipe is not None
    assert not found.problems, [str(problem) for problem in found.problems]
    return recipe


@dataclass
class Run:
    """A run of a test, on this rank, that is about to start."""

    session: Session
    start: RunStart


def run_of(recipe: Recipe, num_ranks: int) -> Run:
    """Does what `train.run` does before it trains, inside a process group."""
    device = Device.detect()
    folder = RunFolder(recipe.job.dump_folder)
    on_rank0(folder.create)
    run_data = prepare_run_data(recipe, recipe.model.vocab_size or 2048, progress=False)
    start = resolve(recipe, Site(folder, num_ranks, device.type))
    assert isinstance(start, RunStart), start
    checkpointer = CheckpointManager(start.recipe.checkpoint, folder.path, start.checkpoint)
    return Run(Session(folder, device, run_data, checkpointer, StopSignal()), start)


@contextlib.contextmanager
def trainer_of(recipe: Recipe, num_ranks: int):
    """A loaded trainer of this rank, inside a process group."""
    run = run_of(recipe, num_ranks)
    with (
        mock.patch(
            "titan_growth.metrics.observers.peak_flops_per_second", return_value=(1e12, "not measured, to save time")
        ),
        run.session.trainer(run.start) as trainer,
    ):
        yield trainer


def train(rank: int, num_ranks: int, recipe: Recipe) -> None:
    """Trains a recipe to its end on this rank."""
    with trainer_of(recipe, num_ranks) as trainer:
        assert trainer.fit()


def save_tensors(
    checkpoints: CheckpointManager,
    step: int,
    tensors: dict[str, Any],
    *,
    num_ranks: int = 1,
    model_only: bool = True,
    permanent: bool = False,
) -> None:
    """Saves tensors as the checkpoint of a step, without a run around it. Collective."""
    manifest = Manifest(
        Progress(step=step), 1, num_ranks, "", model_only=model_only, permanent=permanent, metrics_offset=0
    )
    checkpoints.saver.save(manifest, tensors, recipe_toml="", lineage_json=Lineage().to_json())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl but that of its data, which has no step."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") != "data"]


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's training steps."""
    return [line for line in read_metrics(folder) if "num_layers" in line]


def without_timings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_parity(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], *, first: float = 1e-5, later: float = 1e-4
) -> None:
    """Both runs saw the same tokens and computed the same numbers, up to relative differences."""
    kinds = [
        [(line["step"], "validation_loss" in line, line.get("tokens")) for line in run] for run in (found, expected)
    ]
    assert kinds[0] == kinds[1]
    for line, reference in zip(found, expected, strict=True):
        tolerance = first if line["step"] == 1 else later
        for key in NUMBERS:
            if key in reference:
                assert math.isfinite(reference[key])
                difference = relative_difference(line, reference, key)
                assert difference <= tolerance, f"step {line['step']}: {key} is {line[key]}, not {reference[key]}"


NUMBERS = ("loss", "grad_norm", "validation_loss")


def relative_difference(line: dict[str, Any], reference: dict[str, Any], key: str) -> float:
    """Of one number of two lines."""
    return abs(line[key] - reference[key]) / abs(reference[key])
