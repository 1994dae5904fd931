"""A save that fails, anywhere and on any rank: one line for the user, nothing left behind, older checkpoints intact."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.unit.checkpoint.test_manager import found_in, manager, save
from titan_growth.checkpoint import saving
from titan_growth.checkpoint.writer import HashedFile, ShardWriter
from titan_growth.tools.errors import CheckpointError


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "/disk/step-6")


def _full_disk(rank: int, folder: Path) -> None:
    logging.disable(logging.CRITICAL)  # DCP logs the traceback
    checkpoints = manager(folder)
    save(checkpoints, 5)
    failures = [(ShardWriter, "write_data"), (HashedFile, "write"), (ShardWriter, "finish"), (saving, "file_entry"),
                (saving, "write_atomic"), (saving, "write_manifest")]  # fmt: skip
    for owner, name in failures:
        with replaced(owner, name, no_space), pytest.raises(CheckpointError) as caught:
            save(checkpoints, 6)
        assert str(caught.value) == (
            "step-6 was not saved: No space left on device: /disk/step-6. Earlier checkpoints are intact"
        ), name
        assert not (checkpoints.root / "step-6").exists(), f"{name} left something behind"
        found = found_in(checkpoints)
        assert found is not None
        assert found.step == 5
    assert save(checkpoints, 6).step == 6, "a failed save keeps the next one from working"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """Wherever in the save it strikes."""
    run_ranks(_full_disk, 1, tmp_path)


def _foreign_errors(rank: int, folder: Path) -> None:
    """Storage packages raise errors other than OSError; such a save is retried like any other."""
    logging.disable(logging.CRITICAL)
    checkpoints = manager(folder, save_retries=1)
    saving.time.sleep = lambda seconds: None  # type: ignore[assignment]
    commit, left = saving.write_manifest, [1]

    def fails_once(*args: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("HTTP 503")
        commit(*args)

    with replaced(saving, "write_manifest", fails_once):
        assert save(checkpoints, 5).step == 5

    def fails(*args: Any) -> None:
        raise RuntimeError("HTTP 503")

    message = "step-6 was not saved: HTTP 503. Earlier checkpoints are intact"
    with replaced(saving, "write_manifest", fails), pytest.raises(CheckpointError, match=message):
        save(checkpoints, 6)
    with replaced(checkpoints.saver.retention, "prune", fails):
        assert save(checkpoints, 7).step == 7, "a failed removal undoes the save"
    found = found_in(checkpoints)
    assert found is not None
    assert found.step == 7


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_errors_of_any_type_fail_the_save(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(_foreign_errors, num_ranks, tmp_path)


def _small_disk(rank: int, folder: Path) -> None:
    usage = SimpleNamespace(free=50)
    with replaced(shutil, "disk_usage", lambda path: usage), pytest.raises(CheckpointError) as caught:
        save(manager(folder), 6)
    assert str(caught.value).startswith("step-6 was not saved: it needs 0.0 MiB, but only 0.0 MiB are free in ")
    assert "\n" not in str(caught.value)
    assert not (folder / "checkpoint" / "step-6").exists()
    (folder / "checkpoint").rmdir()
    (folder / "checkpoint").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"^step-6 was not saved: [^\n]+$"):
        save(manager(folder), 6)


def test_a_save_that_cannot_fit_is_not_started(tmp_path: Path) -> None:
    run_ranks(_small_disk, 1, tmp_path)


def _one_rank_fails(rank: int, folder: Path) -> str:
    logging.disable(logging.CRITICAL)
    if rank == 1:
        ShardWriter.write_data = no_space  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as caught:
        save(manager(folder), 6)
    return str(caught.value)


def test_a_failure_on_one_rank_fails_all(tmp_path: Path) -> None:
    for message in run_ranks(_one_rank_fails, 2, tmp_path):
        assert message.endswith(
            "step-6 was not saved: No space left on device: /disk/step-6. Earlier checkpoints are intact"
        )
    assert list((tmp_path / "checkpoint").iterdir()) == []
