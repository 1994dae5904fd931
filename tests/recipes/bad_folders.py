"""Run folders that cannot be used, and disks that fill up."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.recipes.bad_inputs import Case, NotPossibleHereError, Setup
from titan_growth.tools.run_folder import RunFolder


def _in_use(folder: Path, stack: ExitStack) -> None:
    other = RunFolder(folder / "run")
    other.create()
    other.lock()
    stack.callback(other.unlock)


def disk(kib: int, filled_kib: int = 0) -> Setup:
    """Puts the run folder on a disk of its own of that size."""

    def setup(folder: Path, stack: ExitStack) -> None:
        run = folder / "run"
        run.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(run)]
        if subprocess.run(mount, capture_output=True).returncode:
            raise NotPossibleHereError("mounting a small disk needs root")
        stack.callback(subprocess.run, ["umount", "-l", str(run)], check=True)
        if filled_kib:
            (run / "filler").write_bytes(bytes(filled_kib * 1024))

    return setup


def _folder_named(name: str) -> Setup:
    return lambda folder, _: (folder / name).mkdir(parents=True)


NO_CHECKPOINTS = "[checkpoint]\nenable = false\n"

CASES = [
    Case(
        "folder is a file",
        r"job\.dump_folder .*corpus\.txt: it is a file\. Remove it, or name another folder",
        toml='[job]\ndump_folder="corpus.txt"',
    ),
    Case(
        "folder under a file",
        r"job\.dump_folder .*corpus\.txt is a file\. Remove it, or name another folder",
        toml='[job]\ndump_folder="corpus.txt/run"',
    ),
    Case(
        "folder not writable",
        r"job\.dump_folder /proc/run: cannot be written to",
        toml='[job]\ndump_folder = "/proc/run"',
    ),
    Case(
        "folder name too long",
        r"cannot be written to \(File name too long\)",
        toml=f'[job]\ndump_folder = "{"a" * 300}"',
    ),
    Case("folder in use by another run", r"job\.dump_folder .*run: in use by process \d+", setup=_in_use),
    Case("folder in use, resume", r"job\.dump_folder .*run: in use by process \d+", setup=_in_use, resumes=True),
    Case("lock is a folder", r"job\.dump_folder .*run: cannot be locked", setup=_folder_named("run/.lock")),
    Case(
        "metrics.jsonl is a folder",
        r"metrics\.jsonl: .*[Ii]s a directory",
        setup=_folder_named("run/metrics.jsonl"),
        status=2,
        trains=True,
    ),
    Case(
        "layers.jsonl is a folder",
        r"layers\.jsonl: .*[Ii]s a directory",
        toml="[metrics]\nlayers_freq = 1",
        setup=_folder_named("run/layers.jsonl"),
        status=2,
        trains=True,
    ),
    Case(
        "recipe.toml is a folder",
        r"recipe\.toml: cannot be written .*[Ii]s a directory",
        setup=_folder_named("run/recipe.toml"),
        status=2,
        trains=True,
    ),
    Case(
        "checkpoint folder is a file",
        r"checkpoint\.folder: .*exit\.json is a file\. Remove",
        toml='[checkpoint]\nfolder = "exit.json"',
        setup=lambda folder, _: ((folder / "run").mkdir(), (folder / "run/exit.json").write_text("x")),
    ),
    Case("disk full at the start", r"job\.dump_folder .*run: cannot be written to \(No space left", setup=disk(64, 64)),
    Case("disk too small for a checkpoint", r"a checkpoint .* needs 1\.5 MiB, but only .* are free", setup=disk(1000)),
    Case(
        "disk full at the second checkpoint",
        r"step-4 was not saved: it needs 1\.5 MiB, but only .* are free.*Make room",
        setup=disk(3000),
        status=1,
        trains=True,
        goes_on=True,
    ),
    Case(
        "disk full inside a checkpoint",
        r"step-2 was not saved: No space left on device.*Earlier checkpoints are intact",
        setup=disk(1560),
        status=1,
        trains=True,
        goes_on=True,
    ),
    Case(
        "disk full for metrics",
        r"cannot write metrics: No space left",
        toml=NO_CHECKPOINTS,
        flags="--training.steps 2000",
        setup=disk(40),
        status=1,
        trains=True,
    ),
]
