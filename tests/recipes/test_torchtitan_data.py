"""Data of torchtitan's recipes: its `c4_test` and tokenizer where their files are missing, and names of the hub."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.forked import ended
from tests.recipes.test_torchtitan_recipes import merged, recipe_of, write
from tests.runs import WORDS, make_recipe, read_metrics
from tests.unit.data.torchtitan_assets import BOS, EOS, write_debug_tokenizer
from titan_growth.__main__ import main
from titan_growth.config.loader import inspect_recipe
from titan_growth.data.corpus import CorpusSpec
from titan_growth.data.hub import load_from_hub
from titan_growth.run import data as run_data_module
from titan_growth.run.data import C4_TEST_PATH, prepare_run_data, with_stand_ins
from titan_growth.tools.errors import DataError
from titan_growth.tools.findings import Findings
from titan_growth.train import main as train_main


@pytest.mark.slow  # the default suite plans and loads it, below
def test_the_debug_recipe_trains_where_torchtitans_files_are_missing(tmp_path: Path) -> None:
    """Two steps and two validations of the recipe as it is but for sizes, in a folder without any data."""
    table = merged(
        recipe_of("debugmodel"),
        {
            "training": {"steps": 2, "local_batch_size": 2, "seq_len": 64},
            "validation": {"enable": True, "freq": 1, "steps": 1, "local_batch_size": 1, "seq_len": 64},
        },
    )
    write(tmp_path, table)
    words = ["--job.config_file", "recipe.toml", "--model.n_layers", "2"]
    status, output = ended(lambda: train_main(words), folder=tmp_path, environ=dict(os.environ))
    assert status == 0, output
    assert output.count(f"training.dataset: there is no {C4_TEST_PATH} here") == 1
    assert "a part of it is held out in place of 'c4_validation'" in output
    assert output.count("model.hf_assets_path: ./tests/assets/tokenizer does not exist") == 1
    metrics = read_metrics(tmp_path / "outputs")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    assert [line["step"] for line in metrics if "validation_loss" in line] == [1, 2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def c4_recipe(folder: Path, **overrides: Any):
    """A small recipe with torchtitan's test corpus; make_recipe would name a corpus of its own."""
    values = {"training.dataset": "c4_test", "training.dataset_path": None, **overrides}
    recipe = make_recipe(folder / "run")
    return run_data_module.with_values(recipe, values)


def write_c4_test(path: Path) -> None:
    """A corpus of the form that torchtitan's has: one file of JSON lines."""
    path.mkdir(parents=True)
    lines = (json.dumps({"text": " ".join(WORDS), "url": "", "timestamp": ""}) for _ in range(200))
    (path / "data.json").write_text("\n".join(lines))


@pytest.mark.parametrize("path", [None, "tests/assets/c4_test", "./tests/assets/c4_test/"])
def test_files_that_are_there_are_used(path: str | None, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_c4_test(folder / C4_TEST_PATH)
    recipe = c4_recipe(folder, **{"training.dataset_path": path})
    with caplog.at_level(logging.WARNING):
        data = prepare_run_data(recipe, 258, progress=True)
    assert data.corpus.description.startswith(f"{C4_TEST_PATH} (1 files")
    assert not caplog.records


def test_a_path_of_ones_own_is_used(folder: Path) -> None:
    write_c4_test(folder / "mine")
    recipe = with_stand_ins(c4_recipe(folder, **{"training.dataset_path": "mine"}), found := Findings())
    assert recipe.training.dataset_path == "mine"
    assert not found.warnings
    recipe = c4_recipe(folder, **{"training.dataset_path": "typo"})
    assert with_stand_ins(recipe, found := Findings()) == recipe
    assert not found.warnings
    with pytest.raises(DataError, match="typo: does not exist"):
        prepare_run_data(recipe, 258, progress=False)


@pytest.mark.parametrize("path", [None, "./tests/assets/c4_test"])
def test_the_embedded_corpus_stands_in(path: str | None, folder: Path) -> None:
    recipe = with_stand_ins(c4_recipe(folder, **{"training.dataset_path": path}), found := Findings())
    (warning,) = found.warnings
    assert (recipe.training.dataset, recipe.training.dataset_path) == ("stdlib", None)
    assert warning.key == "training.dataset"
    assert "held out" not in warning.message


@pytest.mark.parametrize("dataset", ["c4_test", "c4_validation"])
def test_validation_beside_what_stands_in(dataset: str, folder: Path) -> None:
    values = {"validation.enable": True, "validation.dataset": dataset}
    recipe = with_stand_ins(c4_recipe(folder, **values), found := Findings())
    (warning,) = found.warnings
    assert recipe.validation.dataset is None
    assert f"held out in place of '{dataset}'" in warning.message
    with pytest.raises(DataError, match=r"validation\.dataset: .*data\.validation_fraction = 0"):
        with_stand_ins(c4_recipe(folder, **values, **{"data.validation_fraction": 0.0}), Findings())
    # Another validation corpus is the user's own choice.
    recipe = with_stand_ins(c4_recipe(folder, **values, **{"validation.dataset_path": "mine"}), Findings())
    assert (recipe.validation.dataset, recipe.validation.dataset_path) == (dataset, "mine")


def test_validation_on_files_that_are_there(folder: Path) -> None:
    write_c4_test(folder / C4_TEST_PATH)
    recipe = c4_recipe(folder, **{"validation.enable": True, "validation.dataset": "c4_test"})
    data = prepare_run_data(recipe, 258, progress=False)
    assert data.validation is not None
    assert data.validation.num_tokens > data.corpus.train.num_tokens, "the whole corpus, not the part held out of it"


def test_a_validation_corpus_is_not_fetched_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe of torchtitan names c4_validation, and most do not validate."""
    monkeypatch.setattr("titan_growth.data.hub.load_from_hub", lambda spec: pytest.fail(f"{spec} was loaded"))
    recipe = make_recipe(folder / "run", validation__dataset="c4_validation")
    assert prepare_run_data(recipe, 258, progress=False).validation is not None


def test_only_c4_test_is_replaced(folder: Path) -> None:
    recipe = make_recipe(folder / "run", model__hf_assets_path="./nowhere", data__tokenizer="auto")
    assert with_stand_ins(recipe, found := Findings()) == recipe
    assert not found.warnings
    with pytest.raises(DataError, match="tokenizer nowhere: does not exist"):
        prepare_run_data(recipe, 258, progress=False)
    chosen = {"model.hf_assets_path": "./nowhere", "data.tokenizer": "huggingface"}
    recipe = with_stand_ins(c4_recipe(folder, **chosen), found := Findings())
    assert recipe.model.hf_assets_path == "./nowhere"
    assert [warning.key for warning in found.warnings] == ["training.dataset"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (CorpusSpec("c4"), ("allenai/c4", "en", "train")),
        (CorpusSpec("c4", split="train[:1%]", subset="realnewslike"), ("allenai/c4", "realnewslike", "train[:1%]")),
        (CorpusSpec("c4_validation"), ("allenai/c4", "en", "validation")),
        (CorpusSpec("some/other", subset="x"), ("some/other", "x", "train")),
    ],
)
def test_names_of_the_hub(spec: CorpusSpec, expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan's names mean what they mean there."""
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> None:
        asked.append((name, subset, split, streaming))
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=f"dataset '{spec.dataset}': cannot be loaded from the Hugging Face hub"):
        load_from_hub(spec)
    assert asked == [(*expected, False)]


def checkout(folder: Path) -> Path:
    """What torchtitan's debug recipe reads in a checkout, and the recipe as it is."""
    write_c4_test(folder / C4_TEST_PATH)
    write_debug_tokenizer(folder / "tests/assets/tokenizer")
    return write(folder, recipe_of("debugmodel"))


def test_the_debug_recipe_plans_and_loads_in_a_checkout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = checkout(folder)
    words = ["plan", "--job.config_file", str(recipe)]
    assert main(words) == 0
    line = "tokenizer: huggingface tests/assets/tokenizer/tokenizer.json, 2,004 tokens, BOS 2002, EOS 2003\n"
    assert line in capsys.readouterr().out
    parsed = inspect_recipe(words[1:], found := Findings())
    assert parsed is not None, found.problems
    parsed = run_data_module.with_values(parsed, {"training.seq_len": 64})
    corpus = prepare_run_data(parsed, 2048, progress=False).corpus
    assert (corpus.tokenizer.bos_id, corpus.tokenizer.eos_id) == (BOS, EOS)
    assert corpus.train.read(0, 1).tolist() == [BOS]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.vocab_size", "2003"], r"it has 2,004 tokens, more than the model's vocabulary of 2,003"),
        (["--data.tokenizer_path", "no_eos"], r"it has no EOS token\. Set data\.eos = false"),
        (["--model.hf_assets_path", "broken"], r"not a Hugging Face tokenizer\.json"),
    ],
)
def test_plan_and_check_refuse_a_tokenizer_alike(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout(folder)
    config = json.loads((write_debug_tokenizer(folder / "no_eos") / "tokenizer_config.json").read_text())
    (folder / "no_eos" / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    write_debug_tokenizer(folder / "broken").joinpath("tokenizer.json").write_text("{}")
    said = []
    for command in ("plan", "check"):
        assert main([command, "--job.config_file", "recipe.toml", *words]) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")])
    assert said[0] == said[1]
    assert len(said[0]) == 1
    assert re.search(message, said[0][0])


@pytest.mark.slow
def test_the_debug_recipe_trains_in_a_checkout(tmp_path: Path) -> None:
    """Five steps of the recipe, verbatim but for the size of a batch and a type that a CPU multiplies fast."""
    checkout(tmp_path)
    words = ["--job.config_file", "recipe.toml", "--training.steps", "5", "--training.local_batch_size", "1"]
    words += ["--training.mixed_precision_param", "float32"]
    status, output = ended(lambda: train_main(words), folder=tmp_path, environ=dict(os.environ))
    assert status == 0, output
    assert "tests/assets/tokenizer" in output
    assert [line["step"] for line in read_metrics(tmp_path / "outputs") if "loss" in line] == [1, 2, 3, 4, 5]
