"""The run folder: created, locked, measured, written atomically."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from titan_growth.tools.errors import RunFolderError
from titan_growth.tools.files import write_atomic
from titan_growth.tools.run_folder import RunFolder
from titan_growth.tools.text import gib


def test_created_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.create()
    folder.create()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunFolderError, match=r"^job\.dump_folder .*/run: it is a file\. Remove it, or name"):
        RunFolder(tmp_path / "run").create()
    with pytest.raises(RunFolderError, match=r"run/inner: .*/run is a file\. Remove it"):
        RunFolder(tmp_path / "run" / "inner").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="Permission denied"):
        RunFolder(tmp_path).create()


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").path == tmp_path / "run"


def test_a_lock_keeps_a_second_run_out_and_names_the_first(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.lock()
    with pytest.raises(RunFolderError, match=rf"in use by process {os.getpid()} on {os.uname().nodename}\. Wait"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()
    second.unlock()


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    """A killed process cannot clean up, and still does not block the next run."""
    code = (
        f"from titan_growth.tools.run_folder import RunFolder\nf = RunFolder({str(tmp_path)!r}); f.lock()\n"
        "print('locked', flush=True)\nimport time; time.sleep(60)"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"):
            RunFolder(tmp_path).lock()
        process.kill()
    RunFolder(tmp_path).lock()


def test_space(tmp_path: Path) -> None:
    RunFolder(tmp_path).require_space(1, "a checkpoint")
    with pytest.raises(
        RunFolderError, match=r"a checkpoint needs 1073741824\.00 GiB, but only [0-9.]+ [GM]iB are free"
    ):
        RunFolder(tmp_path).require_space(2**60, "a checkpoint")


def test_a_text_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.toml"
    write_atomic(path, "old")
    with open(path) as reader:
        RunFolder(tmp_path).write_text("recipe.toml", "new é")
        assert reader.read() == "old", "the file was overwritten under its reader"
    assert path.read_text(encoding="utf-8") == "new é"
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.toml"]

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "half")
    assert path.read_text(encoding="utf-8") == "new é"
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.toml"], "half a file is left behind"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.0 MiB"), (2**20, "1.0 MiB"), (2**30, "1.00 GiB"), (3 * 2**29, "1.50 GiB"), (2**30 // 8, "0.12 GiB")],
)
def test_gib(num_bytes: int, text: str) -> None:
    assert gib(num_bytes) == text
