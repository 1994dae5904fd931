"""Checkpoints by URL: saved, killed, resumed and read like those by path."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from tests import storage
from tests.harness import run_ranks
from tests.runs import make_recipe, read_metrics, train, trainer_of, without_timings
from tests.unit.checkpoint.test_manager import save
from titan_growth.checkpoint.folder import file_entry, open_step, root_of
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.steps import committed_steps
from titan_growth.checkpoint.writer import HashedFile
from titan_growth.commands.verify import main as verify
from titan_growth.config.schema.recipe import CheckpointConfig
from titan_growth.tools.files import move_folder, remove_folder, write_atomic

RUN: dict[str, Any] = {
    "training__steps": 8,
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "checkpoint__keep_latest_k": 2,
    "debug__log_batch_hash": True,
    "growth__stages": '[{at = "4 steps", operator = "stack", factor = 2}]',
}


def entries(root: Any) -> dict[str, Any]:
    """Step -> sizes and checksums of the shards."""
    found = committed_steps(root)
    assert not found.refused
    return {
        one.path.name: {name: entry for name, entry in one.manifest.files.items() if name.endswith(".distcp")}
        for one in found.usable
    }


def crash(rank: int, num_ranks: int, recipe: Any, step: int) -> None:
    """Trains, and dies after a step."""
    with trainer_of(recipe, num_ranks) as trainer:
        record = trainer.record

        def die(*args: Any) -> None:
            record(*args)
            if trainer.progress.step == step:
                os._exit(0)

        trainer.record = die  # type: ignore[method-assign]
        trainer.fit()


# By default: `test_a_store`, and that a file:// URL is a path.
@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        pytest.param("async", (3, 5, 7), marks=pytest.mark.slow),
        pytest.param("disabled", (3, 5, 7), marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_by_file_url_is_the_run_by_path(mode: str, kills: tuple[int, ...], tmp_path: Path) -> None:
    settings = {**RUN, "checkpoint__async_mode": mode}
    run_ranks(train, 2, 2, make_recipe(tmp_path / "path", **settings))
    url = f"file://{tmp_path}/store/checkpoints"
    recipe = make_recipe(tmp_path / "url", **settings, checkpoint__folder=url)
    for step in kills:
        with pytest.raises(AssertionError):
            run_ranks(crash, 2, 2, recipe, step)
    run_ranks(train, 2, 2, recipe)
    assert without_timings(read_metrics(tmp_path / "url")) == without_timings(read_metrics(tmp_path / "path"))
    assert not (tmp_path / "url" / "checkpoint").exists()
    by_path, by_url = entries(tmp_path / "path" / "checkpoint"), entries(UPath(url))
    assert by_path == by_url
    assert by_path.keys() == {"step-4", "step-6", "step-8"}


def _in_process(rank: int, folder: Path, url: str) -> None:
    """These stores live in one process, so the whole test does."""
    storage.register()
    train(0, 1, make_recipe(folder / "run", **{**RUN, "training__steps": 6}, checkpoint__folder=url))
    assert set(entries(UPath(url))) == {"step-2", "step-4", "step-6"}
    train(0, 1, make_recipe(folder / "run", **RUN, checkpoint__folder=url))
    assert set(entries(UPath(url))) == {"step-4", "step-6", "step-8"}
    assert verify([url]) == 0
    newest = UPath(url) / "step-8"
    shard = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert verify([url]) == 1
    weights = make_recipe(
        folder / "other", training__steps=1, checkpoint__enable=True, checkpoint__initial_load_path=f"{url}/step-6"
    )
    train(0, 1, weights)
    longer = make_recipe(folder / "run", **{**RUN, "training__steps": 9}, checkpoint__folder=url)
    train(0, 1, longer)
    assert (UPath(url) / "damaged-8").is_dir()
    assert open_step(UPath(url) / "step-9") is not None


@pytest.mark.parametrize(
    "url", [pytest.param("memory://bucket/run", marks=pytest.mark.slow), "bucket://checkpoints/run"]
)
def test_a_store(url: str, tmp_path: Path) -> None:
    """Save, resume, verify, detect damage and start another run, all by URL."""
    run_ranks(_in_process, 1, tmp_path, url)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    """A disk has renames, fsync and a size, which a URL would not use."""
    root = root_of(f"file://{tmp_path}/x", tmp_path)
    assert root == tmp_path / "x"
    assert isinstance(root, Path)


def test_a_shard_that_fails_does_not_appear_in_a_store() -> None:
    storage.register()
    storage.BucketFileSystem.reset()
    with pytest.raises(ZeroDivisionError), HashedFile(UPath("bucket://b/shard")) as file:
        file.write(bytes((3 << 20) // (1 - len("x"))))
    gc.collect()
    assert storage.BucketFileSystem.objects == {}
    with HashedFile(UPath("bucket://b/shard")) as file:
        file.write(bytes(70 << 20))
    assert len(storage.BucketFileSystem.objects["b/shard"]) == 70 << 20
    assert file.entry == file_entry(UPath("bucket://b/shard"))


def _no_answer(rank: int, folder: Path) -> None:
    storage.register()
    root = UPath("bucket://b/checkpoint")
    checkpoints = CheckpointManager(
        CheckpointConfig(enable=True, folder="bucket://b/checkpoint", keep_latest_k=2), folder
    )
    for step in (2, 4):
        save(checkpoints, step, permanent=step == 2)
    checkpoints.saver.close()
    honest = storage.BucketFileSystem.info

    def silent(self: Any, path: str, **more: Any) -> Any:
        if path.endswith("manifest.json"):
            raise TimeoutError("no answer")
        return honest(self, path, **more)

    storage.BucketFileSystem.info = silent
    checkpoints.saver.retention.prune(6)
    checkpoints.saver.retention.wait()
    storage.BucketFileSystem.info = honest
    assert [found.step for found in committed_steps(root).usable] == [4, 2]


def test_a_store_that_does_not_answer_loses_no_checkpoint(tmp_path: Path) -> None:
    """ "It is not there" and "I do not know" are not the same."""
    run_ranks(_no_answer, 1, tmp_path)


@pytest.mark.parametrize("kind", ["path", "file", "memory", "bucket"])
def test_folders_are_moved_and_removed_alike(kind: str, tmp_path: Path) -> None:
    storage.register()
    place = {
        "path": tmp_path / "x",
        "file": UPath(f"file://{tmp_path}/x"),
        "memory": UPath("memory://moved/x"),
        "bucket": UPath("bucket://moved/x"),
    }[kind]
    place.mkdir(parents=True)
    for name in ("a", "b"):
        write_atomic(place / name, name * 3)
    target = place.with_name("y")
    move_folder(place, target)
    assert not place.exists()
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "aaa", "b": "bbb"}
    write_atomic(target / "a", b"new")
    assert (target / "a").read_text() == "new"
    remove_folder(target)
    assert not target.exists()
