"""metrics.jsonl as a durable history (offsets, cut-back, failing disks) and the console's lines and colours."""

from __future__ import annotations

import io
import json
import logging
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from titan_growth.metrics.formatting import format_duration, format_rate
from titan_growth.metrics.records import DataRecord, GrowthRecord, StepRecord, ValidationRecord
from titan_growth.metrics.sinks import ConsoleSink, JsonlSink
from titan_growth.tools.errors import RunFolderError

ROOT = Path(__file__).parents[3]
VALIDATION = ValidationRecord(step=12, tokens=49152, flops=int(1.5e12), seconds=70.0, validation_loss=3.25)
GROWTH = GrowthRecord(
    step=300,
    tokens=1228800,
    flops=int(3e14),
    seconds=71.0,
    from_layers=3,
    to_layers=12,
    loss_before=3.21,
    loss_after=4.56,
)


def step_record(step: int = 12, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "step": step,
        "tokens": 4096 * step,
        "flops": 1.23e13,
        "seconds": 61.5,
        "loss": 6.12341,
        "grad_norm": 1.2345,
        "lr": 8e-4,
        "tokens_per_second": 4103.2,
        "mfu": 0.123,
        "num_layers": 3,
        "step_seconds": 0.5,
        "data_seconds": 0.1,
        "data_share": 0.2,
        "memory_gib": 0.92,
        "peak_memory_gib": 1.5,
        "eta_seconds": 130.0,
        "step_total": 300,
    }
    return StepRecord(**(values | changes))  # type: ignore[arg-type]


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- records


def test_metrics_step_record_has_exactly_these_keys_in_this_order() -> None:
    keys = ["step", "tokens", "flops", "seconds", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "num_layers"]
    assert list(step_record().to_dict()) == keys
    assert list(step_record(batch_hash="abc").to_dict()) == [*keys, "batch_hash"]


def test_metrics_validation_and_growth_records_have_exactly_these_keys() -> None:
    assert list(VALIDATION.to_dict()) == ["step", "tokens", "flops", "seconds", "validation_loss"]
    expected = ["event", "step", "tokens", "flops", "seconds", "from_layers", "to_layers", "loss_before", "loss_after"]
    assert list(GROWTH.to_dict()) == expected
    assert GROWTH.to_dict()["event"] == "growth"


def test_metrics_data_record_has_exactly_these_keys() -> None:
    account = {"kinds": [{"kind": "text", "files": 1}], "left_out": [], "followed_links": {"count": 0, "names": []}}
    record = DataRecord(training_data=account)
    assert list(record.to_dict()) == ["event", "step", "tokens", "flops", "seconds", "training_data"]
    both = json.loads(DataRecord(training_data=account, validation_data=account, seconds=0.0).to_line())
    assert (both["event"], both["training_data"], both["validation_data"]) == ("data", account, account)


def test_metrics_lines_keep_every_bit_of_a_float() -> None:
    for loss in (0.1 + 0.2, 1 / 3, 5e-324, float(np.float32(2.7182817))):
        read = json.loads(step_record(loss=loss).to_line())["loss"]
        assert read.hex() == loss.hex()


def test_metrics_lines_take_numpy_scalars_and_write_totals_as_integers() -> None:
    line = step_record(loss=np.float32(1.5), tokens=np.int64(2**40), flops=1.23e13).to_line()
    assert '"loss": 1.5,' in line
    assert f'"tokens": {2**40},' in line
    assert '"flops": 12300000000000,' in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_metrics_values_that_are_not_finite_become_null(value: float) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    line = json.loads(step_record(loss=value, grad_norm=value).to_line(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["lr"] == 8e-4


# ---- metrics.jsonl


def test_metrics_jsonl_is_on_disk_after_each_record_and_counts_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.jsonl"
    sink = JsonlSink(path)
    assert sink.offset == 0
    sink.record(step_record())
    assert lines_of(path) == [step_record().to_dict()]
    assert sink.offset == path.stat().st_size
    sink.record(VALIDATION)
    sink.record(GROWTH)
    assert lines_of(path)[1:] == [VALIDATION.to_dict(), GROWTH.to_dict()]
    assert sink.offset == path.stat().st_size
    sink.close()


def test_metrics_resumed_file_equals_that_of_an_unbroken_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    sink = JsonlSink(whole)
    for step in range(1, 7):
        sink.record(step_record(step))

    sink = JsonlSink(broken)
    for step in range(1, 6):
        sink.record(step_record(step))
        if step == 3:
            checkpointed = sink.offset
    sink.close()
    sink = JsonlSink(broken, resume_offset=checkpointed)
    assert sink.offset == checkpointed
    for step in range(4, 7):
        sink.record(step_record(step))
    assert broken.read_bytes() == whole.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir() if "old" in entry.name] == []


def test_metrics_fresh_run_moves_older_lines_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("first\n")
    (tmp_path / "metrics.jsonl.old-1").write_text("even older\n")
    with caplog.at_level(logging.INFO, logger="titan_growth"):
        JsonlSink(path).record(VALIDATION)
    assert (tmp_path / "metrics.jsonl.old-1").read_text() == "even older\n"
    assert (tmp_path / "metrics.jsonl.old-2").read_text() == "first\n"
    assert lines_of(path) == [VALIDATION.to_dict()]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} holds an older run: moved to metrics.jsonl.old-2"
    ]


def test_metrics_fresh_run_leaves_an_empty_file_in_place(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    JsonlSink(tmp_path / "metrics.jsonl").close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("before", "offset", "after"),
    [
        (None, 10, b""),
        (b"one\n", 10, b"one\n"),
        (b"one\ntwo\ntor", 11, b"one\ntwo\n"),  # as long as the checkpoint says, but the last line is half
        (b"one\ntwo\n", 6, b"one\n"),  # the offset is within a line
        (b"x" * 9000, 8500, b""),
        (b"one\n" + b"x" * 9000, 9004, b"one\n"),  # the line end is several blocks back
    ],
)
def test_metrics_resume_of_a_file_that_does_not_match_keeps_whole_lines_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: bytes | None, offset: int, after: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    if before is not None:
        path.write_bytes(before)
    sink = JsonlSink(path, resume_offset=offset)
    assert path.read_bytes() == after
    assert sink.offset == len(after)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    sink.record(VALIDATION)
    assert path.read_bytes() == after + VALIDATION.to_line().encode() + b"\n"


def test_metrics_matching_resume_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\n")
    JsonlSink(path, resume_offset=4).close()
    assert path.read_bytes() == b"one\n"
    assert caplog.records == []


def test_metrics_full_disk_is_a_one_line_run_folder_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    sink = JsonlSink(path)
    with pytest.raises(RunFolderError, match="No space left") as caught:
        sink.record(step_record())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    sink.close()  # must not bring the same error up again


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """The operating system refuses to let any file grow beyond this many bytes: a disk that fills up mid-line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 256 * 1024
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_a_line_that_did_not_fit_is_taken_out_again(tmp_path: Path, file_size_limit: int) -> None:
    path = tmp_path / "metrics.jsonl"
    start = b"x" * (file_size_limit - 21) + b"\n"
    path.write_bytes(start)
    sink = JsonlSink(path, resume_offset=len(start))
    with pytest.raises(RunFolderError, match="File too large"):
        sink.record(VALIDATION)
    assert path.read_bytes() == start
    assert sink.offset == len(start)


def test_metrics_file_that_cannot_be_opened_is_a_run_folder_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot write metrics: "):
        JsonlSink(tmp_path / "logs" / "metrics.jsonl")


# ---- console


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The package's logger, away from the root logger, in an environment that allows colour."""
    logger = logging.getLogger("titan_growth")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    level = logger.level
    logger.setLevel(logging.INFO)
    yield logger
    logger.setLevel(level)


def attach(monkeypatch: pytest.MonkeyPatch, *handlers: logging.Handler) -> None:
    """Make these the only handlers. From the test's body: pytest adds one of its own, no terminal, after fixtures."""
    monkeypatch.setattr(logging.getLogger("titan_growth"), "handlers", list(handlers))


def attach_stream(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    attach(monkeypatch, logging.StreamHandler(stream))
    return stream


def test_metrics_console_lines_read_as_documented(console: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = attach_stream(monkeypatch, io.StringIO())
    sink = ConsoleSink()
    sink.record(step_record())
    sink.record(VALIDATION)
    sink.record(GROWTH)
    assert stream.getvalue().splitlines() == [
        "step 12/300  4.0%  loss 6.1234  grad_norm 1.2345  lr 8.00e-04  4,103 tok/s  mfu 12.3%  mem 0.92 GiB  "
        "flops 1.23e+13  eta 2m10s",
        "validation loss 3.2500  at step 12  tokens 49,152  flops 1.50e+12",
        "grown 3 -> 12 layers at step 300: loss 3.21 before, 4.56 after (same held-out batch)",
    ]


def test_metrics_console_colours_every_kind_of_line_on_a_terminal(
    console: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = attach_stream(monkeypatch, FakeTerminal())
    sink = ConsoleSink()
    sink.record(step_record())
    sink.record(VALIDATION)
    sink.record(GROWTH)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert all("\x1b[" in line and line.count("\x1b[") == 2 * line.count("\x1b[0m") for line in lines)


@pytest.mark.parametrize("how", ["disable_color", "NO_COLOR", "TERM"])
def test_metrics_console_colour_can_be_refused(
    console: logging.Logger, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    stream = attach_stream(monkeypatch, FakeTerminal())
    if how != "disable_color":
        monkeypatch.setenv(how, "dumb")
    ConsoleSink(disable_color=how == "disable_color").record(step_record())
    assert "step 12/300" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_metrics_console_writes_no_colour_when_a_log_file_gets_the_same_lines(
    console: logging.Logger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = FakeTerminal()
    log_file = logging.FileHandler(tmp_path / "log.txt")
    attach(monkeypatch, logging.StreamHandler(stream), log_file)
    ConsoleSink().record(step_record())
    log_file.close()
    assert (tmp_path / "log.txt").read_text() == stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "0.2s"),
        (9, "9s"),
        (59.6, "1m00s"),
        (119.7, "2m00s"),
        (130, "2m10s"),
        (3599.9, "1h00m"),
        (3 * 3600 + 5 * 60 + 59, "3h05m"),
        (86399, "23h59m"),
        (2 * 86400 + 4 * 3600, "2d04h"),
        (float("nan"), "?"),
        (float("inf"), "?"),
        (-1, "?"),
    ],
)
def test_metrics_durations_are_short_and_never_show_sixty(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_metrics_rates_take_the_fitting_prefix() -> None:
    assert [format_rate(value) for value in (731.4e9, 989e12, 2250e12, 999.9e9, 12.0)] == [
        "731 GFLOP/s",
        "989 TFLOP/s",
        "2.25 PFLOP/s",
        "1 TFLOP/s",
        "12 FLOP/s",
    ]


def test_metrics_import_leaves_heavy_libraries_alone() -> None:
    modules = ", ".join(f"titan_growth.metrics.{name}" for name in ("boards", "profiling", "recorder"))
    code = f"import sys, {modules}; print([name for name in ('tensorboard', 'wandb') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
