"""TensorBoard event files read back as TensorBoard reads them, a disk that fills up, and the W&B sink."""

from __future__ import annotations

import logging
import resource
import sys
import threading
import types
from pathlib import Path

import pytest

from titan_growth.metrics.boards import TensorBoardSink, WandbSink
from titan_growth.metrics.records import GrowthRecord, StepRecord, ValidationRecord
from titan_growth.tools.errors import ConfigError, RunFolderError

GROWTH = GrowthRecord(
    step=2, tokens=8192, flops=int(3e9), seconds=1.0, from_layers=3, to_layers=12, loss_before=3.25, loss_after=4.5
)


def step_record(step: int, loss: float = 6.0) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=4096 * step,
        flops=2**40,
        seconds=0.5 * step,
        loss=loss,
        grad_norm=1.25,
        lr=0.5,
        tokens_per_second=4096.0,
        mfu=0.25,
        num_layers=3,
        step_seconds=0.5,
        data_seconds=0.125,
        data_share=0.25,
        memory_gib=0.75,
        peak_memory_gib=1.5,
        eta_seconds=130.0,
        step_total=300,
    )


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_metrics_tensorboard_tags_and_values_come_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.record(step_record(1))
    sink.record(ValidationRecord(step=1, tokens=4096, flops=int(1e9), seconds=1.0, validation_loss=5.5))
    sink.record(GROWTH)
    sink.close()
    assert read_back(tmp_path) == {
        "loss_metrics/global_avg_loss": [(1, 6.0)],
        "grad_norm": [(1, 1.25)],
        "lr": [(1, 0.5)],
        "throughput(tps)": [(1, 4096.0)],
        "mfu(%)": [(1, 25.0)],
        "time_metrics/end_to_end(s)": [(1, 0.5)],
        "time_metrics/data_loading(s)": [(1, 0.125)],
        "time_metrics/data_loading(%)": [(1, 25.0)],
        "memory/max_active(GiB)": [(1, 1.5)],
        "n_tokens_seen": [(1, 4096.0)],
        "flops": [(1, 2.0**40)],
        "num_layers": [(1, 3.0)],
        "validation_metrics/loss": [(1, 5.5)],
        "growth/num_layers": [(2, 12.0)],
        "growth/loss_before": [(2, 3.25)],
        "growth/loss_after": [(2, 4.5)],
    }


def test_metrics_tensorboard_marks_a_growth_with_a_sentence(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.record(GROWTH)
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (mark,) = events.Tensors("growth/text_summary")
    assert mark.step == 2
    assert b"grown 3 -> 12 layers at step 2" in mark.tensor_proto.string_val[0]


def test_metrics_tensorboard_hides_the_steps_that_a_resume_takes_again(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3, 4):
        sink.record(step_record(step, loss=1.0))
    sink.close()
    sink = TensorBoardSink(tmp_path, purge_step=3)
    sink.record(step_record(3, loss=2.0))
    sink.close()
    assert read_back(tmp_path)["loss_metrics/global_avg_loss"] == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Errors of threads that would have been printed with a traceback."""
    errors: list[object] = []

    def keep(args: threading.ExceptHookArgs) -> None:
        errors.append(args.exc_value)

    monkeypatch.setattr(threading, "excepthook", keep)
    return errors


def test_metrics_tensorboard_on_a_full_disk_warns_once_and_goes_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, printed: list[object]
) -> None:
    before = threading.excepthook
    sink = TensorBoardSink(tmp_path)
    sink.record(step_record(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, hard))
    try:
        for step in range(2, 200):
            sink.record(step_record(step))
        sink.record(GROWTH)
        sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].getMessage() == f"TensorBoard events in {tmp_path} stop here: File too large"
    assert printed == []
    assert [thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboard")] == []
    assert threading.excepthook is before
    assert (1, 6.0) in read_back(tmp_path)["loss_metrics/global_avg_loss"]


def test_metrics_tensorboard_disk_that_fills_after_the_last_record_is_reported_by_close(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, printed: list[object]
) -> None:
    folder = tmp_path / "board"
    sink = TensorBoardSink(folder)
    (event_file,) = folder.iterdir()
    event_file.unlink()
    folder.rmdir()
    sink.record(ValidationRecord(step=1, tokens=1, flops=1, seconds=1.0, validation_loss=1.0))
    sink.close()
    assert len(caplog.records) == 1
    assert "No such file" in caplog.records[0].getMessage()
    assert printed == []


def test_metrics_tensorboard_leaves_the_errors_of_other_threads_alone(tmp_path: Path, printed: list[object]) -> None:
    sink = TensorBoardSink(tmp_path)

    def fail() -> None:
        raise OSError("not of tensorboard")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    sink.close()
    assert [str(error) for error in printed] == ["not of tensorboard"]


def test_metrics_tensorboard_folder_that_cannot_be_made_is_a_run_folder_error(tmp_path: Path) -> None:
    before = threading.excepthook
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"metrics\.enable_tensorboard"):
        TensorBoardSink(tmp_path / "file" / "board")
    assert threading.excepthook is before


def test_metrics_wandb_that_is_not_installed_names_key_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as caught:
        WandbSink(tmp_path)
    assert [problem.key for problem in caught.value.problems] == ["metrics.enable_wandb"]
    assert "pip install 'titan_growth[wandb]'" in str(caught.value)


def test_metrics_wandb_gets_the_same_points_and_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append(("finish",))

    def init(**settings: object) -> Run:
        calls.append(("init", settings))
        return Run()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)

    sink = WandbSink(tmp_path / "wb", project="p", run_name="r", config={"model": {"dim": 8}})
    assert (tmp_path / "wb").is_dir()
    sink.record(step_record(4))
    sink.record(ValidationRecord(step=4, tokens=1, flops=1, seconds=1.0, validation_loss=5.5))
    sink.record(GROWTH)
    sink.close()
    init_call, step_call, *others = calls
    assert init_call == (
        "init",
        {"project": "p", "name": "r", "dir": str(tmp_path / "wb"), "config": {"model": {"dim": 8}}},
    )
    assert step_call[0] == 4
    assert step_call[1]["loss_metrics/global_avg_loss"] == 6.0  # type: ignore[index]
    assert others == [
        (4, {"validation_metrics/loss": 5.5}),
        (2, {"growth/num_layers": 12.0, "growth/loss_before": 3.25, "growth/loss_after": 4.5}),
        ("finish",),
    ]
