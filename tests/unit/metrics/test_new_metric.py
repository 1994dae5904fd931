"""A new metric is two edits, its field and its value: file, curves and console follow from the record."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.metrics.test_boards import read_back
from tests.unit.metrics.test_recorder import Clock, growth_event
from titan_growth.checkpoint.history import Progress
from titan_growth.metrics.boards import TensorBoardSink
from titan_growth.metrics.recorder import Recorder
from titan_growth.metrics.records import GrowthRecord, StepRecord, ValidationRecord, metric
from titan_growth.metrics.sinks import ConsoleSink, JsonlSink
from titan_growth.metrics.throughput import Throughput


@dataclass(frozen=True, kw_only=True)
class RouterStep(StepRecord):
    entropy: float = metric(console="{blue}entropy {entropy:.3f}{end}", tag="router/entropy")
    router: str | None = None


@dataclass(frozen=True, kw_only=True)
class AccurateValidation(ValidationRecord):
    accuracy: float = metric(console="accuracy {accuracy:.1%}", tag="accuracy(%)", scale=100)


@dataclass(frozen=True, kw_only=True)
class ReadingGrowth(GrowthRecord):
    bytes_read: int = metric(console="{bytes_read} bytes read", tag="growth/bytes_read")
    """Needs no value from the caller: a `GrowthEvent` has it."""


def test_a_field_more_is_in_the_file_the_curves_and_the_console(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, board = tmp_path / "metrics.jsonl", tmp_path / "tb"
    meter = Throughput(peak_flops=1e6, clock=Clock())
    recorder = Recorder(
        sinks=[JsonlSink(file), TensorBoardSink(board), ConsoleSink()], meter=meter, log_freq=1, total_steps=4
    )
    now = Progress(step=2, tokens=20, flops=200)
    event = growth_event(2, 6, 2.0, 2.5)
    with caplog.at_level(logging.INFO, logger="titan_growth"):
        recorder.record(now, RouterStep(loss=2.5, grad_norm=1.0, lr=1e-3, num_layers=3, entropy=0.5, router="top2"))
        recorder.record(now, AccurateValidation(validation_loss=3.5, accuracy=0.25))
        recorder.record(event, ReadingGrowth.of(event))
    recorder.close()

    step, validation, growth = (json.loads(line) for line in file.read_text().splitlines())
    assert list(step.items())[-2:] == [("entropy", 0.5), ("router", "top2")]
    assert list(validation.items())[-1] == ("accuracy", 0.25)
    assert list(growth.items())[-1] == ("bytes_read", 0)
    curves = read_back(board)
    assert curves["router/entropy"] == [(2, 0.5)]
    assert curves["accuracy(%)"] == [(2, 25.0)]
    assert curves["growth/bytes_read"] == [(2, 0.0)]
    lines = [record.getMessage() for record in caplog.records]
    assert "GiB  entropy 0.500  flops 2.00e+02" in lines[0]
    assert lines[1] == "validation loss 3.5000  at step 2  tokens 20  flops 2.00e+02  accuracy 25.0%"
    assert lines[2].endswith("after (same held-out batch)  0 bytes read")
