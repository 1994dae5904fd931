"""Which steps are logged, what the sinks receive, and what the closing summary says, across a resume too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titan_growth.checkpoint.history import GrowthEvent, Progress
from titan_growth.metrics.recorder import Recorder
from titan_growth.metrics.records import MEASURED, GrowthRecord, Record, StepRecord, ValidationRecord
from titan_growth.metrics.sinks import JsonlSink
from titan_growth.metrics.throughput import Throughput


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class ListSink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.others: list[Record] = []
        self.num_closed = 0

    def record(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self.steps.append(record)
        else:
            self.others.append(record)

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, *sinks: ListSink | JsonlSink, log_freq: int = 10, total_steps: int = 25) -> Recorder:
    meter = Throughput(peak_flops=1e6, clock=clock)
    return Recorder(sinks=sinks, meter=meter, log_freq=log_freq, total_steps=total_steps)


def at(step: int) -> Progress:
    return Progress(step=step, tokens=100 * step, flops=5000 * step)


def run_steps(metrics: Recorder, clock: Clock, first: int, last: int, loss: float = 2.5) -> None:
    for step in range(first, last + 1):
        with metrics.meter.data():
            clock.now += 0.5
        clock.now += 1.5
        metrics.meter.count_step(tokens=100, flops_per_token=50.0)
        if metrics.should_log(step):
            record = StepRecord(loss=loss, grad_norm=1.0, lr=1e-3, num_layers=3, batch_hash=f"hash{step}")
            metrics.record(at(step), record)


def validate(metrics: Recorder, step: int, loss: float) -> ValidationRecord:
    return metrics.record(at(step), ValidationRecord(validation_loss=loss))


def growth_event(step: int, to_layers: int, loss_before: float, loss_after: float | None) -> GrowthEvent:
    return GrowthEvent(
        step=step,
        tokens=100 * step,
        flops=5000 * step,
        operator="stack",
        stage={},
        from_sizes={"n_layers": 3},
        to_sizes={"n_layers": to_layers},
        layer_map=(),
        source=f"step-{step}",
        mesh="",
        num_ranks=1,
        loss_before=loss_before,
        loss_after=loss_after,
        seconds=123.0,
    )


def test_metrics_first_every_nth_and_last_step_are_logged(clock: Clock) -> None:
    sink = ListSink()
    metrics = make(clock, sink)
    run_steps(metrics, clock, 1, 25)
    assert [record.step for record in sink.steps] == [1, 10, 20, 25]
    assert [step for step in range(1, 26) if metrics.should_log(step)] == [1, 10, 20, 25]


def test_metrics_a_resumed_run_logs_the_steps_of_an_unbroken_one(clock: Clock) -> None:
    sink = ListSink()
    run_steps(make(clock, sink), clock, 13, 25)
    assert [record.step for record in sink.steps] == [20, 25]


def test_metrics_step_records_carry_the_numbers_given_and_measured(clock: Clock) -> None:
    sink = ListSink()
    metrics = make(clock, sink)
    run_steps(metrics, clock, 1, 10)
    record = sink.steps[-1]
    expected = StepRecord(
        step=10,
        tokens=1000,
        flops=50000,
        seconds=20.0,
        loss=2.5,
        grad_norm=1.0,
        lr=1e-3,
        tokens_per_second=50.0,
        mfu=50.0 * 50.0 / 1e6,
        num_layers=3,
        batch_hash="hash10",
    )
    assert record.to_dict() == expected.to_dict()
    assert (record.step_seconds, record.data_seconds, record.eta_seconds) == (2.0, 0.5, 30.0)
    assert record.step_total == 25
    assert record.peak_memory_gib >= record.memory_gib > 0.01


def test_metrics_steps_between_logs_are_in_the_next_rate(clock: Clock) -> None:
    sink = ListSink()
    metrics = make(clock, sink)
    run_steps(metrics, clock, 1, 9)
    clock.now += 18.0  # nine more steps' worth of time, after eight unlogged steps
    run_steps(metrics, clock, 10, 10)
    assert sink.steps[-1].tokens_per_second == pytest.approx(900 / 36.0)


def test_metrics_growth_restarts_the_eta(clock: Clock) -> None:
    sink = ListSink()
    metrics = make(clock, sink, log_freq=1, total_steps=20)
    run_steps(metrics, clock, 1, 10)
    event = growth_event(10, 6, 2.0, 2.5)
    metrics.record(event, GrowthRecord.of(event))
    clock.now += 4.0  # step 11 takes 6 s instead of 2 s
    run_steps(metrics, clock, 11, 11)
    assert sink.steps[-1].eta_seconds == pytest.approx(9 * 6.0)


def test_metrics_all_sinks_get_everything_and_are_closed_once(clock: Clock) -> None:
    sinks = [ListSink(), ListSink()]
    metrics = make(clock, *sinks)
    validation = validate(metrics, 5, 3.5)
    event = growth_event(5, 6, 2.0, 2.5)
    growth = metrics.record(event, GrowthRecord.of(event))
    metrics.close()
    metrics.close()
    for sink in sinks:
        assert sink.others == [validation, growth]
        assert sink.num_closed == 1
    assert validation == ValidationRecord(step=5, tokens=500, flops=25000, seconds=0.0, validation_loss=3.5)
    assert (growth.from_layers, growth.to_layers, growth.loss_before, growth.loss_after) == (3, 6, 2.0, 2.5)


def test_metrics_refuse_a_log_frequency_of_zero(clock: Clock) -> None:
    with pytest.raises(ValueError, match="log_freq"):
        make(clock, log_freq=0)


def run_with_events(metrics: Recorder, clock: Clock) -> None:
    validate(metrics, 0, 10.5)
    run_steps(metrics, clock, 1, 10)
    with metrics.meter.pause("validation"):
        clock.now += 10.0
    validate(metrics, 10, 4.25)
    with metrics.meter.pause("growth"):
        clock.now += 5.0
    event = growth_event(10, 12, 3.21, 4.56)
    metrics.record(event, GrowthRecord.of(event))
    run_steps(metrics, clock, 11, 25)
    with metrics.meter.pause("checkpoint"):
        clock.now += 35.0
    validate(metrics, 25, 4.5)


def test_metrics_closing_summary_tells_what_the_run_did_and_where_to_look(clock: Clock) -> None:
    metrics = make(clock, ListSink())
    run_with_events(metrics, clock)
    lines = metrics.closing_summary(
        at(25),
        metrics_path="out/metrics.jsonl",
        tensorboard_folder="out/my tb",
        checkpoint=Path("out/checkpoint/step-25"),
        recipe="out/recipe.toml",
    )
    assert lines == [
        "finished: step 25/25, 2,500 tokens, 1.25e+05 FLOPs, wall-clock 1m40s",
        "validation loss: first 10.5000 (step 0), last 4.5000 (step 25), best 4.2500 (step 10)",
        "growth: 3 -> 12 layers at step 10, loss 3.21 before, 4.56 after",
        "speed: 50 tok/s on average, mfu 0.2%",
        "time: train 38s (38%), data 12s (12%), validation 10s (10%), growth 5s (5%), checkpoint 35s (35%)",
        "metrics: out/metrics.jsonl",
        "curves: tensorboard --logdir 'out/my tb'",
        "last checkpoint: out/checkpoint/step-25",
        "effective recipe: out/recipe.toml",
        "export to Hugging Face: titan_growth export --from out/checkpoint/step-25 --to exported",
        "go on: the same command with a larger training.steps",
        "plot: titan_growth plot out=out --to curves.png",
    ]
    weights = metrics.closing_summary(at(25), checkpoint="step-25", only_weights=True, plugins=["mine", "other"])
    assert weights[-1] == (
        "export to Hugging Face: titan_growth export --from step-25 --to exported --plugins mine,other"
    ), "it cannot go on from weights alone"
    stopped = metrics.closing_summary(at(20), verb="stopped", checkpoint="out/checkpoint/step-20")
    assert stopped[-1] == "last checkpoint: out/checkpoint/step-20", "it goes on by itself"


def test_metrics_closing_summary_says_nothing_of_what_did_not_happen(clock: Clock) -> None:
    lines = make(clock, ListSink()).closing_summary(Progress())
    assert lines == [
        "finished: step 0/25, 0 tokens, 0.00e+00 FLOPs, wall-clock 0s",
        "time: train 0s (0%), data 0s (0%)",
    ]


def test_metrics_a_diverged_validation_is_not_the_best(clock: Clock) -> None:
    metrics = make(clock, ListSink())
    for step, loss in ((1, float("nan")), (2, 3.0), (3, float("nan"))):
        validate(metrics, step, loss)
    lines = metrics.closing_summary(at(3))
    assert "validation loss: first nan (step 1), last nan (step 3), best 3.0000 (step 2)" in lines


def test_metrics_summary_after_a_resume_is_of_the_whole_run(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "metrics.jsonl"
    first = make(clock, JsonlSink(path))
    run_with_events(first, clock)
    validate(first, 25, float("nan"))
    first.close()
    with open(path, "a") as file:
        file.write('{"step": "someone else\'s line"}\nnot JSON\n[]\n')

    second = make(clock, ListSink(), total_steps=27)
    second.summary.load(path, resumed_at=25)
    run_steps(second, clock, 26, 26)
    lines = second.closing_summary(at(26))
    assert lines[0] == "finished: step 26/27 (resumed at step 25), 2,600 tokens, 1.30e+05 FLOPs, wall-clock 2s"
    assert lines[1] == "validation loss: first 10.5000 (step 0), last nan (step 25), best 4.2500 (step 10)"
    assert lines[2] == "growth: 3 -> 12 layers at step 10, loss 3.21 before, 4.56 after"


def test_metrics_validations_with_shadow_weights_have_keys_of_their_own(tmp_path: Path, clock: Clock) -> None:
    """In the file, on the console, as curves, and in the summary, before a resume and after."""
    path = tmp_path / "metrics.jsonl"
    first = make(clock, JsonlSink(path))
    validate(first, 5, 4.0)  # before there was an average
    record = first.record(at(10), ValidationRecord.of({"": 3.0, "ema": 3.5}))
    first.record(at(20), ValidationRecord.of({"": 2.5, "ema": float("nan")}))
    first.close()
    assert "validation loss 3.0000, ema 3.5000  at step 10" in record.console_line()
    assert record.scalars() == {"validation_metrics/loss": 3.0, "validation_metrics/ema_loss": 3.5}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("ema_validation_loss", "none") for line in lines] == ["none", 3.5, None]
    second = make(clock, ListSink())
    second.summary.load(path, resumed_at=20)
    second.record(at(25), ValidationRecord.of({"": 2.0, "ema": 2.25}))
    summary = second.closing_summary(at(25))
    assert summary[1] == "validation loss: first 4.0000 (step 5), last 2.0000 (step 25), best 2.0000 (step 25)"
    assert summary[2] == "  with ema: first 3.5000 (step 10), last 2.2500 (step 25), best 2.2500 (step 25)"


def test_metrics_history_that_cannot_be_read_is_a_warning(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = make(clock, ListSink())
    metrics.summary.load(tmp_path / "none.jsonl", resumed_at=3)
    assert "history cannot be read: No such file" in caplog.text
    assert "(resumed at step 3)" in metrics.closing_summary(at(3))[0]


def test_metrics_file_of_a_broken_and_resumed_run_equals_the_unbroken_one(tmp_path: Path) -> None:
    def stable(path: Path) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]

    clock = Clock()
    metrics = make(clock, JsonlSink(tmp_path / "whole.jsonl"), log_freq=2, total_steps=9)
    run_steps(metrics, clock, 1, 9)

    sink = JsonlSink(tmp_path / "broken.jsonl")
    metrics = make(clock, sink, log_freq=2, total_steps=9)
    run_steps(metrics, clock, 1, 5)
    checkpointed = sink.offset
    run_steps(metrics, clock, 6, 8)
    metrics.close()
    metrics = make(clock, JsonlSink(tmp_path / "broken.jsonl", checkpointed), log_freq=2, total_steps=9)
    run_steps(metrics, clock, 6, 9)
    assert stable(tmp_path / "broken.jsonl") == stable(tmp_path / "whole.jsonl")
