"""The example of docs/extending/adding_an_operator.md, taken from the page, loaded as a plugin, grows a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ended
from tests.runs import BASE, argv_of, read_metrics, write_corpus
from titan_growth.__main__ import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending" / "adding_an_operator.md"


def block(language: str) -> str:
    (text,) = [
        text for its, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        if its == language
    ]  # fmt: skip
    return text


def run(folder: Path, script: str, text: str | None = None, **values: Any) -> tuple[int, str]:
    (folder / "sandwich.py").write_text(text or block("python"))
    (folder / "recipe.toml").write_text(block("toml"))
    flags = {**BASE, "growth.base.n_layers": 3, "metrics.enable_tensorboard": False, **values}
    words = [
        *argv_of(flags),
        "--job.config_file",
        str(folder / "recipe.toml"),
        "--job.dump_folder",
        str(folder / "run"),
    ]
    if script != "train":
        environment = {**os.environ, "WORLD_SIZE": "2"}
        return ended(lambda: main([script, *words]), folder=folder, environ=environment, paths=(folder,))
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "NGPU": "2"}
    done = subprocess.run(
        [str(ROOT / "run_train.sh"), *words], env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout + done.stderr


def test_a_class_that_is_no_operator_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """With the page's own message."""
    line, _ = re.findall(r"^```\n(error: .*)\n```$", PAGE.read_text(), re.MULTILINE)
    text = block("python").replace("def grow(", "def grown(")
    status, found = run(tmp_path, "plan", text=text)
    assert status == 2, found
    assert line in found


def test_a_map_that_does_not_fit_is_one_message(tmp_path: Path) -> None:
    """That of the page."""
    _, line = re.findall(r"^```\n(error: .*)\n```$", PAGE.read_text(), re.MULTILINE)
    text = block("python").replace("before.num_layers - 1),", "before.num_layers),")
    status, found = run(tmp_path, "plan", text=text)
    assert status == 2, found
    assert line.removesuffix(" ...") in found
    assert "Traceback" not in found


@pytest.mark.slow
def test_the_example_grows_a_run(tmp_path: Path) -> None:
    """2 ranks; 3 layers become 4, and since its copies are silent the loss does not change."""
    corpus = str(write_corpus(tmp_path / "corpus.txt"))
    status, output = run(tmp_path, "train", **{"training.dataset_path": corpus, "checkpoint.enable": True})
    assert status == 0, output
    (growth,) = [line for line in read_metrics(tmp_path / "run") if "event" in line]
    assert (growth["from_layers"], growth["to_layers"]) == (3, 4)
    assert growth["loss_before"] == growth["loss_after"]
    lineage = json.loads((tmp_path / "run" / "checkpoint" / "step-6" / "lineage.json").read_text())
    assert lineage["events"][0]["layer_map"] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"growth.stages.0.options": "{quiet = true}"}, "growth.stages.0.options.quiet: is no option of 'sandwich'"),
        ({"growth.base.n_layers": 2}, "growth.stages.0: needs 3 layers or more, and the model has 2"),
        ({"model.n_layers": 5}, "growth.stages: the growths do not end at the model of [model]"),
    ],
)
def test_its_mistakes_are_reported_before_anything_starts(flags: dict[str, Any], expected: str, tmp_path: Path) -> None:
    status, found = run(tmp_path, "plan", **{"checkpoint.enable": True, **flags})
    assert status == 2, found
    assert expected in found
