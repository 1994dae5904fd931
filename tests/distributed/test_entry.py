"""The real entry point in its own process, new or forked: output, files and status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked import ended
from tests.runs import BASE, argv_of, read_metrics, without_timings, write_corpus
from titan_growth.train import main


def words_of(folder: Path, **overrides: object) -> list[str]:
    corpus = folder.parent / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    values = {**BASE, "job.dump_folder": str(folder), "training.dataset_path": str(corpus)}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return argv_of(values)


def run(folder: Path, **overrides: object) -> str:
    """Runs to the end; what it printed."""
    words = words_of(folder, **overrides)
    status, output = ended(lambda: main(words), folder=folder.parent, environ=dict(os.environ))
    assert status == 0, output
    assert "Traceback" not in output
    return output


SAVING = {"checkpoint__enable": True, "checkpoint__interval": 2, "lr_scheduler__decay_ratio": 0.0}


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Status 75, a checkpoint of the step it stopped at, and after the resume the lines of an unbroken run."""
    settings = {**SAVING, "checkpoint__interval": 1000, "training__steps": 1500}
    command = [sys.executable, "-m", "titan_growth.train", *words_of(tmp_path / "run", **settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count('"loss":') >= 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert 5 <= step < 1500
    assert f"stopped at step {step} and saved" in output
    assert f"stopped: step {step}/1500" in output
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["status"] == 75
    assert [path.name for path in (tmp_path / "run" / "checkpoint").glob("*-*")] == [f"step-{step}"]
    run(tmp_path / "run", **{**settings, "training__steps": step + 3})
    run(tmp_path / "whole", **{**settings, "training__steps": step + 3})
    for folder in ("run", "whole"):  # written once, and not again by the resume
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line).get("event") for line in lines]
        assert (events[0], events.count("data")) == ("data", 1)
    assert without_timings(read_metrics(tmp_path / "run")) == without_timings(read_metrics(tmp_path / "whole"))


@pytest.mark.slow
def test_going_back_happens_once(tmp_path: Path) -> None:
    """load_step rewinds the first time; the same command again resumes, or has nothing to do."""
    run(tmp_path / "run", **SAVING)
    back = {**SAVING, "checkpoint__load_step": 2}
    assert "superseded-4" in run(tmp_path / "run", **back)
    assert "nothing to do: this run is finished at step 6" in run(tmp_path / "run", **back)
    assert "resumed from" in run(tmp_path / "run", **{**back, "training__steps": 8})
    names = {path.name for path in (tmp_path / "run" / "checkpoint").glob("*-*")}
    assert names == {"step-2", "step-4", "step-6", "step-8", "superseded-4", "superseded-6", "gone-back-to"}
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_help_of_one_section(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever --help stands; an unknown section is an error."""
    monkeypatch.setenv("COLUMNS", "120")
    for words in (["--help", "growth"], ["--training.steps", "3", "--help", "growth"]):
        assert main(words) == 0
        output = capsys.readouterr().out
        assert "--growth.stages.N.at" in output
        assert "--training.steps" not in output
    assert main(["--training.steps", "3", "--help"]) == 0
    assert "--training.steps" in capsys.readouterr().out
    assert main(["--help", "grwth"]) == 2
    assert "there is no section 'grwth'" in capsys.readouterr().out


def test_help_of_the_module() -> None:
    """As it is typed, in a process of its own."""
    command = [sys.executable, "-m", "titan_growth.train", "--help", "growth"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert "--growth.stages.N.at" in result.stdout


DRY_RUN_MESHES = {
    "pp2 tp2": {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2},
    "dp2 cp2": {"data_parallel_shard_degree": 2, "context_parallel_degree": 2},
    "pp2 V-shaped": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
}


@pytest.mark.parametrize("mesh", DRY_RUN_MESHES)
def test_dry_run_succeeds_without_other_ranks(tmp_path: Path, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone on a mesh: what others would send must not be memory that happens to be there.

    Under `debug.deterministic` PyTorch fills such memory with NaN, so one use of it makes the gradient norm NaN.
    """
    degrees = DRY_RUN_MESHES[mesh]
    num_ranks = 2 if mesh == "pp2 V-shaped" else 4
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": num_ranks}.items():
        monkeypatch.setenv(name, str(value))
    parallelism = {f"parallelism__{key}": value for key, value in degrees.items()}
    output = run(tmp_path / "run", comm__mode="fake_backend", debug__deterministic=True, **parallelism)
    assert "step 1/1" in output
    assert "nan" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
