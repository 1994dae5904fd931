"""A resumed run goes on with what it began with, told apart by content: corpora, tokenizer, weights, schedule."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.bad_data import small_tokenizer
from tests.runs import make_recipe
from tests.unit.checkpoint.test_folder import MANIFEST
from titan_growth.checkpoint.folder import write_manifest
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.data.content import ContentHashes
from titan_growth.run.data import RunData, prepare_run_data
from titan_growth.run.inputs import changes_since, input_hashes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TITAN_GROWTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


WRITTEN_BY_0_2_0 = "d71f883ab9925cf5"
"""What that version's checkpoints remember of the corpus "t": a fingerprint of its tokens."""


def data_of(tmp_path: Path, **settings: Any) -> RunData:
    return prepare_run_data(make_recipe(tmp_path / "run", **settings), 258, progress=False)


def put(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with the time that archives and images give to all."""
    folder.mkdir(exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    os.utime(folder / name, ns=(0, 0))
    return folder / name


def corpus(folder: Path, letter: str) -> Path:
    put(folder, "part-0.txt", f"{letter} line\n" * 500)
    return folder


def problems(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [str(problem) for problem in changes_since(before, now, "step-4").problems]


def test_another_corpus_of_equal_names_sizes_and_times_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    one, other = corpus(tmp_path / "a", "x"), corpus(tmp_path / "b", "y")
    before = data_of(tmp_path, training__dataset_path=str(one)).fingerprints()
    (refused,) = problems(before, data_of(tmp_path, training__dataset_path=str(other)).fingerprints())
    assert refused.startswith("training.dataset: step-4 was trained with another corpus (")
    assert f"Its data was: {one} (1 files" in refused
    moved = one.rename(tmp_path / "moved")
    assert problems(before, data_of(tmp_path, training__dataset_path=str(moved)).fingerprints()) == []


def test_another_validation_corpus_is_refused(tmp_path: Path) -> None:
    settings = {"training__dataset_path": str(corpus(tmp_path / "train", "t")), "validation__enable": True}
    one, other = corpus(tmp_path / "a", "x"), corpus(tmp_path / "b", "y")
    before = data_of(tmp_path, validation__dataset_path=str(one), **settings).fingerprints()
    now = data_of(tmp_path, validation__dataset_path=str(other), **settings).fingerprints()
    (refused,) = problems(before, now)
    assert refused.startswith("validation.dataset_path: step-4 was trained with another validation corpus (")
    assert f"Its data was: {one} (1 files" in refused
    moved = one.rename(tmp_path / "moved")
    assert problems(before, data_of(tmp_path, validation__dataset_path=str(moved), **settings).fingerprints()) == []


def test_a_tokenizer_of_equal_name_size_and_time_is_refused(tmp_path: Path) -> None:
    text = small_tokenizer()
    one, other = put(tmp_path / "a", "tokenizer.json", text), put(tmp_path / "b", "tokenizer.json", text[:-1] + b" }")
    put(tmp_path / "a", "tokenizer.json", text + b" ")
    assert one.stat().st_size == other.stat().st_size
    settings = {
        "training__dataset_path": str(corpus(tmp_path / "train", "t")),
        "data__tokenizer": "huggingface",
        "data__bos": False,
        "data__eos": False,
    }
    before = data_of(tmp_path, data__tokenizer_path=str(one), **settings).fingerprints()
    (refused,) = problems(before, data_of(tmp_path, data__tokenizer_path=str(other), **settings).fingerprints())
    assert refused.startswith("data.tokenizer: step-4 was trained with another tokenizer (")
    moved = one.rename(tmp_path / "tokenizer.json")
    assert problems(before, data_of(tmp_path, data__tokenizer_path=str(moved), **settings).fingerprints()) == []


def test_a_checkpoint_of_an_older_version_is_compared_by_what_it_has(tmp_path: Path) -> None:
    settings = {
        "training__dataset_path": str(corpus(tmp_path / "train", "t")),
        "validation__enable": True,
        "validation__dataset_path": str(corpus(tmp_path / "a", "x")),
    }
    now = data_of(tmp_path, **settings).fingerprints()
    old = {name: now[name] for name in ("corpus", "tokenizer", "description")}
    assert old["corpus"] == WRITTEN_BY_0_2_0
    assert problems(old, now) == []
    assert len(problems({**old, "corpus": "0" * 16}, now)) == 1


def hf_folder(folder: Path, letter: str) -> Path:
    put(folder, "config.json", "{}")
    put(folder, "model.safetensors", letter * 1000)
    put(folder, "README.md", letter)
    return folder


def dcp_folder(folder: Path, letter: str) -> Path:
    put(folder, ".metadata", "metadata")
    put(folder, "__0_0.distcp", letter * 1000)
    return folder


def step_folder(folder: Path, letter: str) -> Path:
    put(folder, "__0_0.distcp", letter * 1000)
    write_manifest(folder, replace(MANIFEST, files={"__0_0.distcp": {"bytes": 1000, "sha256": letter * 64}}))
    return folder


@pytest.mark.parametrize("make", [hf_folder, dcp_folder, step_folder])
def test_other_initial_weights_are_refused(make: Callable[[Path, str], Path], tmp_path: Path) -> None:
    def hashes_of(path: Path | str) -> dict[str, str]:
        recipe = make_recipe(tmp_path / "run", checkpoint__enable=True, checkpoint__initial_load_path=str(path))
        return input_hashes(recipe, ContentHashes(tmp_path / "cache"))

    one, other = make(tmp_path / "a", "1"), make(tmp_path / "b", "2")
    before = hashes_of(one)
    (refused,) = problems(before, hashes_of(other))
    assert refused.startswith("checkpoint.initial_load_path: step-4 descends from other weights (")
    assert refused.endswith("or leave the key out: the run goes on from its own checkpoint")
    assert hashes_of(f"file://{one}").keys() == before.keys()
    moved = one.rename(tmp_path / "moved")
    put(moved, "README.md", "another text about the same weights")
    assert problems(before, hashes_of(moved)) == []
    shutil.rmtree(moved)
    assert problems(before, hashes_of(moved)) == []  # nobody needs them any more


def test_another_schedule_is_said(tmp_path: Path) -> None:
    def hashes_of(path: Path) -> dict[str, str]:
        recipe = make_recipe(tmp_path / "run", parallelism__pipeline_parallel_schedule_csv=str(path))
        return input_hashes(recipe, ContentHashes(tmp_path / "cache"))

    one, other = put(tmp_path / "a", "s.csv", "0F0,0B0"), put(tmp_path / "b", "s.csv", "0F0,0I0")
    found = changes_since(hashes_of(one), hashes_of(other), "step-4")
    assert found.problems == []
    assert [str(warning) for warning in found.warnings] == [
        "parallelism.pipeline_parallel_schedule_csv: it is another schedule than step-4 was trained with"
    ]
    assert changes_since(hashes_of(one), hashes_of(one), "step-4").warnings == []


def test_a_manifest_keeps_all_fingerprints(tmp_path: Path) -> None:
    data = {"corpus": "0" * 16, "validation": "1" * 16, "initial_weights": "2" * 16, "schedule": "3" * 16}
    assert Manifest.from_json(replace(MANIFEST, data=data).to_json()).data == data
    assert json.loads(replace(MANIFEST, data=data).to_json())["data"] == data
