"""Real traces of real steps, when they are written, and what a recipe may not ask of the profiler."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from titan_growth.config.loader import inspect_recipe
from titan_growth.metrics.profiling import Profiler
from titan_growth.run.plan import plan_run
from titan_growth.tools import torch_private
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, object] = {
    "enable_profiling": True,
    "save_traces_folder": "traces",
    "profile_freq": 4,
    "profiler_active": 1,
    "profiler_warmup": 1,
    "enable_memory_snapshot": False,
    "save_memory_snapshot_folder": "snapshots",
    "rank": 2,
    "device_type": "cpu",
}


def make(folder: Path, **changes: object) -> Profiler:
    return Profiler(dump_folder=folder, **(SETTINGS | changes))  # type: ignore[arg-type]


def train(profiler: Profiler, first: int, last: int) -> None:
    """Steps that can be told apart in a trace by the name of what they run."""
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"training_step_{step}"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.step()


def steps_in(trace: Path) -> list[str]:
    events: list[Mapping[str, object]] = json.loads(trace.read_text())["traceEvents"]
    names = {str(event.get("name")) for event in events}
    assert "aten::matmul" in names
    return sorted(name for name in names if name.startswith("training_step_"))


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_metrics_profiler_writes_the_last_step_of_every_cycle(tmp_path: Path) -> None:
    profiler = make(tmp_path)
    train(profiler, 1, 9)
    profiler.close()
    profiler.close()
    assert files_under(tmp_path) == ["traces/iteration_4/rank2_trace.json", "traces/iteration_8/rank2_trace.json"]
    assert steps_in(tmp_path / "traces/iteration_4/rank2_trace.json") == ["training_step_4"]
    assert steps_in(tmp_path / "traces/iteration_8/rank2_trace.json") == ["training_step_8"]


def test_metrics_profiler_records_as_many_steps_as_are_active(tmp_path: Path) -> None:
    profiler = make(tmp_path, profiler_active=2, profile_freq=3)
    train(profiler, 1, 3)
    profiler.close()
    assert steps_in(tmp_path / "traces/iteration_3/rank2_trace.json") == ["training_step_2", "training_step_3"]


def test_metrics_profiler_of_a_resumed_run_counts_on(tmp_path: Path) -> None:
    profiler = make(tmp_path, start_step=100)
    train(profiler, 101, 104)
    profiler.close()
    assert files_under(tmp_path) == ["traces/iteration_104/rank2_trace.json"]


def test_metrics_profiler_leaves_what_it_recorded_when_the_run_ends(tmp_path: Path) -> None:
    profiler = make(tmp_path, profiler_active=3)
    train(profiler, 1, 2)
    profiler.close()
    assert steps_in(tmp_path / "traces/iteration_2/rank2_trace.json") == ["training_step_2"]


def test_metrics_profiler_that_is_off_does_nothing(tmp_path: Path) -> None:
    with make(tmp_path, enable_profiling=False) as profiler:
        train(profiler, 1, 8)
    assert files_under(tmp_path) == []


def test_metrics_trace_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "traces").write_text("a file where the folder should be")
    profiler = make(tmp_path)
    train(profiler, 1, 4)
    profiler.close()
    assert "rank2_trace.json: profile not written: " in caplog.text


def test_metrics_trace_on_a_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiler = make(tmp_path)
    train(profiler, 1, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # within the trace's first key
    try:
        train(profiler, 4, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    profiler.close()
    assert "rank2_trace.json: profile not written: the file ends early" in caplog.text


@pytest.mark.slow
def test_metrics_profiler_is_quiet_about_starting_a_second_cycle(tmp_path: Path) -> None:
    # In a process of its own, because PyTorch gives this warning once per process.
    code = (
        "import sys\n"
        "from titan_growth.metrics.profiling import Profiler\n"
        f"profiler = Profiler(dump_folder=sys.argv[1], **{SETTINGS!r})\n"
        "for _ in range(9):\n"
        "    profiler.step()\n"
        "profiler.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Warning" not in done.stderr
    assert len(files_under(tmp_path)) == 2


# ---- memory snapshots


@pytest.fixture
def cuda_memory(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Stands in for the two CUDA-only functions and keeps how recording was switched; a `gpu` test uses the real."""
    switched: list[object] = []

    def record(enabled: object = "all", max_entries: int = 0) -> None:
        switched.append(enabled)

    monkeypatch.setattr(torch_private, "record_memory_history", record)
    monkeypatch.setattr(torch_private, "dump_memory_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    return switched


def test_metrics_memory_snapshots_are_written_every_cycle(tmp_path: Path, cuda_memory: list[object]) -> None:
    with make(tmp_path, enable_profiling=False, enable_memory_snapshot=True, start_step=10) as profiler:
        train(profiler, 11, 19)
        assert cuda_memory == ["all"]
    assert cuda_memory == ["all", None]
    assert files_under(tmp_path) == [
        "snapshots/iteration_14/rank2_memory_snapshot.pickle",
        "snapshots/iteration_18/rank2_memory_snapshot.pickle",
    ]


def run_out_of(error: Exception, profiler: Profiler) -> None:
    with profiler:
        train(profiler, 1, 2)
        raise error


def test_metrics_running_out_of_memory_leaves_a_snapshot(tmp_path: Path, cuda_memory: list[object]) -> None:
    profiler = make(tmp_path, enable_profiling=False, enable_memory_snapshot=True)
    with pytest.raises(torch.OutOfMemoryError):
        run_out_of(torch.OutOfMemoryError("no memory"), profiler)
    assert files_under(tmp_path) == ["snapshots/iteration_3_exit/rank2_memory_snapshot.pickle"]
    assert cuda_memory == ["all", None]


def test_metrics_other_errors_leave_no_snapshot(tmp_path: Path, cuda_memory: list[object]) -> None:
    profiler = make(tmp_path, enable_profiling=False, enable_memory_snapshot=True)
    with pytest.raises(ZeroDivisionError):
        run_out_of(ZeroDivisionError(), profiler)
    assert files_under(tmp_path) == []


@pytest.mark.gpu
def test_metrics_memory_snapshot_of_a_gpu_can_be_read(tmp_path: Path) -> None:
    with make(tmp_path, enable_profiling=False, enable_memory_snapshot=True, device_type="cuda") as profiler:
        held = torch.ones(1024, device="cuda")
        for _ in range(4):
            profiler.step()
    snapshot = pickle.loads((tmp_path / "snapshots/iteration_4/rank2_memory_snapshot.pickle").read_bytes())
    assert held.numel() == 1024
    assert snapshot["segments"]


# ---- what a recipe may not ask


def refusals(*words: str, device_type: str = "cpu") -> list[Problem]:
    recipe = inspect_recipe(["--profiling.enable_profiling", *words], found := Findings())
    assert recipe is not None
    plan_run(recipe, found, num_ranks=1, device_type=device_type)
    return found.problems


def keys(*words: str, device_type: str = "cpu") -> list[str]:
    return [problem.key for problem in refusals(*words, device_type=device_type)]


def test_metrics_profiling_that_works_is_accepted() -> None:
    assert keys() == []
    assert keys("--profiling.profile_freq=2", "--profiling.profiler_warmup=1") == []
    assert keys("--profiling.enable_memory_snapshot", device_type="cuda") == []


def test_metrics_memory_snapshots_are_refused_on_a_cpu() -> None:
    wanted = "--profiling.enable_memory_snapshot"
    assert keys(wanted) == ["profiling.enable_memory_snapshot"]
    assert keys(wanted, "--profiling.enable_profiling=false") == ["profiling.enable_memory_snapshot"]


def test_metrics_a_cycle_that_is_too_short_is_refused() -> None:
    cycle = ("--profiling.profile_freq=3", "--profiling.profiler_active=2", "--profiling.profiler_warmup=2")
    (problem,) = refusals(*cycle)
    assert problem.key == "profiling.profile_freq"
    assert "= 4" in str(problem)
    assert keys("--profiling.enable_profiling=false", "--profiling.profile_freq=0") == ["profiling.profile_freq"]


def test_metrics_all_bad_numbers_are_reported_at_once() -> None:
    zero = ("--profiling.profile_freq=0", "--profiling.profiler_active=0", "--profiling.profiler_warmup=-1")
    assert keys(*zero) == ["profiling.profile_freq", "profiling.profiler_active", "profiling.profiler_warmup"]
