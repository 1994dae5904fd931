"""The example of docs/extending/adding_an_optimizer.md, taken from the page, loaded as a plugin, trains and grows."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ended
from tests.runs import BASE, argv_of, read_metrics, write_corpus
from titan_growth.__main__ import main
from titan_growth.checkpoint.reader import SafeReader

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending" / "adding_an_optimizer.md"


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return text


def words(folder: Path, text: str | None = None, **values: Any) -> list[str]:
    (folder / "lion.py").write_text(text or block("python"))
    (folder / "recipe.toml").write_text(block("toml"))
    paths = {"job.config_file": str(folder / "recipe.toml"), "job.dump_folder": str(folder / "run")}
    return argv_of({**BASE, "metrics.enable_tensorboard": False, **paths, **values})


def plan(folder: Path, *more: str, **written: Any) -> tuple[int, str]:
    given = [*words(folder, **written), *more]
    return ended(lambda: main(["plan", *given]), folder=folder, environ=dict(os.environ), paths=(folder,))


def test_the_plan_knows_what_it_keeps(tmp_path: Path) -> None:
    """One moment instead of two: a third of a checkpoint less. Weights of 3 GiB, so that digits can tell."""
    sizes = ["--model.dim", "8192", "--model.n_layers", "1", "--checkpoint.enable", "true"]
    weights = {}
    for name, options in (("Lion", "{beta3 = 0.98}"), ("AdamW", "{}")):
        status, found = plan(tmp_path, *sizes, "--optimizer.name", name, "--optimizer.options", options)
        assert status == 0, found
        (row,) = re.findall(r"^ +0 +0 +1 +[\d,]+ +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+$", found, re.M)
        (stored,) = re.findall(r"checkpoints: ([\d.]+) GiB each", found)
        weights[name] = [float(number) for number in (*row, stored)]
    whole = weights["Lion"][0]
    assert whole > 1
    assert weights["Lion"] == pytest.approx([whole, whole, whole, 2 * whole], abs=2e-3)
    assert weights["AdamW"] == pytest.approx([whole, whole, 2 * whole, 3 * whole], abs=2e-3)


BETA3 = "--optimizer.options.beta3"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([BETA3, "1.5"], "optimizer.options: beta3 must be at least 0 and less than 1, got 1.5"),
        ([BETA3, "true"], "optimizer.options.beta3: must be like its default, 0.99, got True"),
        (
            ["--optimizer.options.beta4", "0.5"],
            "optimizer.options.beta4: is no option of 'Lion'. Did you mean 'beta3'?",
        ),
        (["--optimizer.name", "Lyon"], "optimizer.name: unknown optimizer 'Lyon'; known: Adam, AdamW, Muon, Lion. Did"),
        (["--optimizer.name", "AdamW"], "optimizer.options.beta3: is no option of 'AdamW'. Remove it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(more: list[str], message: str, tmp_path: Path) -> None:
    status, found = plan(tmp_path, *more)
    assert status == 2, found
    assert f"error: {message}" in found


STATE = 'StateTensor("exp_avg", 1)'
NAMED = '@register_optimizer("Lion")'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def rule_of(", "def rules_of(", "lion.Lion: lacks rule_of"),
        (STATE, STATE.replace("1", "2"), "lion.Lion: keeps exp_avg of power 2, which elsewhere is of power 1"),
        (STATE, STATE.replace("_", "."), "lion.Lion: keeps 'exp.avg'. A name of state has no dots"),
        (NAMED, NAMED.replace("Lion", "AdamW"), "titan_growth.optimizers.adam.AdamW is called 'AdamW' already"),
    ],
)
def test_a_class_that_is_no_optimizer_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    status, found = plan(tmp_path, text=block("python").replace(old, new))
    assert status == 2, found
    assert message in found


@pytest.mark.slow
def test_it_trains_and_grows_on_two_ranks(tmp_path: Path) -> None:
    """Its momentum is carried through an asymmetric growth: kept for the original layers, zero for copies."""
    corpus = write_corpus(tmp_path / "corpus.txt")
    stage = '[{at = "3 steps", factor = 2, optimizer_state = "asymmetric", lr_policy = "continue"}]'
    more = {"training.dataset_path": str(corpus), "optimizer.lr": 1e-3, "growth.stages": stage,
            "checkpoint.enable": True, "checkpoint.interval": 3}  # fmt: skip
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [str(ROOT / "run_train.sh"), *words(tmp_path, **more)],
        env={**os.environ, "PYTHONPATH": path, "NGPU": "2"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    names = SafeReader(tmp_path / "run" / "checkpoint" / "step-6").tensor_entries()
    kept = {name.rsplit(".", 1)[1] for name in names if name.startswith("optimizer.state.")}
    assert kept == {"exp_avg"}
