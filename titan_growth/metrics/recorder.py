"""The recorder: completes records with what it measures and hands them to the sinks.

Which steps are logged (the first, every `log_freq`-th, the last) depends on the step's number alone. All ranks agree on
it without talking, which matters because getting a loss to log is a collective operation; and a resumed run logs
exactly the steps that an uninterrupted one would have.

Every rank builds a `Recorder`. Only one has the console and `metrics.jsonl`; a rank without sinks writes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from titan_growth.checkpoint.history import GrowthEvent, Progress
from titan_growth.metrics.formatting import format_duration
from titan_growth.metrics.hardware import memory_gib
from titan_growth.metrics.layers import LayersRecord
from titan_growth.metrics.records import GrowthRecord, Record, StepRecord
from titan_growth.metrics.sinks import Sink
from titan_growth.metrics.summary import RunSummary
from titan_growth.metrics.throughput import Throughput

RecordT = TypeVar("RecordT", bound=Record)


class Recorder:
    """Records steps, validations and growths in `sinks`, and what the layers do in `layer_sinks`.

    Both are empty on ranks that do not write; a sink may be in both.

    `meter` is fed by the loop. `total_steps` is the step the run ends at, `log_freq` the distance in steps between
    logs, `device_type` says whose memory is reported, and `seconds_before` is the wall-clock of the run until this
    process took over.

    Raises:
        ValueError: `log_freq` is not positive.
    """

    def __init__(
        self,
        *,
        sinks: Sequence[Sink],
        meter: Throughput,
        log_freq: int,
        total_steps: int,
        device_type: str = "cpu",
        seconds_before: float = 0.0,
        layer_sinks: Sequence[Sink] = (),
    ) -> None:
        if log_freq < 1:
            raise ValueError(f"log_freq must be at least 1, got {log_freq}")
        self.meter = meter
        self.summary = RunSummary()
        self._sinks = list(sinks)
        self._layer_sinks = list(layer_sinks)
        self._log_freq = log_freq
        self._total_steps = total_steps
        self._device_type = device_type
        self.seconds_before = seconds_before

    @property
    def seconds(self) -> float:
        """Wall-clock of the run until now, over all the processes that led here."""
        return self.seconds_before + sum(self.meter.phase_seconds().values())

    def should_log(self, step: int) -> bool:
        """Whether `step` (counted from 1) is logged. The same answer on every rank."""
        return step == 1 or step == self._total_steps or step % self._log_freq == 0

    def record(self, at: Progress | GrowthEvent, record: RecordT) -> RecordT:
        """Log a record of what happened at `at`; returns it with everything filled in.

        Raises:
            RunFolderError: `metrics.jsonl` cannot be written.
        """
        measured = self._measure(at.step) if isinstance(record, StepRecord) else {}
        record = replace(record, step=at.step, tokens=at.tokens, flops=at.flops, seconds=self.seconds, **measured)
        if isinstance(record, GrowthRecord):
            self.meter.forget_step_time()  # the grown model's steps take longer
        self.summary.add(record)
        for sink in self._layer_sinks if isinstance(record, LayersRecord) else self._sinks:
            sink.record(record)
        return record

    def _measure(self, step: int) -> dict[str, Any]:
        """Speed, time and memory since the last logged step."""
        window = self.meter.take()
        memory, peak_memory = memory_gib(self._device_type)
        return {
            "tokens_per_second": window.tokens_per_second,
            "mfu": window.mfu,
            "step_seconds": window.step_seconds,
            "data_seconds": window.data_seconds_per_step,
            "data_share": window.data_share,
            "memory_gib": memory,
            "peak_memory_gib": peak_memory,
            "eta_seconds": self.meter.eta_seconds(self._total_steps - step),
            "step_total": self._total_steps,
        }

    def closing_summary(
        self,
        reached: Progress,
        *,
        verb: str = "finished",
        metrics_path: str | Path | None = None,
        tensorboard_folder: str | Path | None = None,
        checkpoint: str | Path | None = None,
        recipe: str | Path | None = None,
        only_weights: bool = False,
        plugins: Sequence[str] = (),
    ) -> list[str]:
        """What the run did, one fact a line; paths that are None are left out.

        Args:
            only_weights: the checkpoint has no moments, so that the run cannot go on from it.
            plugins: of the recipe, without which the checkpoint means nothing.

        Speed, wall-clock and phases are of this process; the rest is of the whole run if `summary.load` was called.
        """
        phases = self.meter.phase_seconds()
        wall = sum(phases.values())
        resumed = "" if self.summary.resumed_at is None else f" (resumed at step {self.summary.resumed_at})"
        lines = [
            f"{verb}: step {reached.step}/{self._total_steps}{resumed}, {reached.tokens:,} tokens, "
            f"{reached.flops:.2e} FLOPs, wall-clock {format_duration(wall)}",
            *self.summary.lines(),
        ]
        if self.meter.num_steps:
            rate, mfu = self.meter.mean_tokens_per_second(), 100.0 * self.meter.mean_mfu()
            lines.append(f"speed: {rate:,.0f} tok/s on average, mfu {mfu:.1f}%")
        shares = [
            f"{name} {format_duration(seconds)} ({100.0 * seconds / wall if wall > 0 else 0.0:.0f}%)"
            for name, seconds in phases.items()
        ]
        lines.append(f"time: {', '.join(shares)}")
        curves = tensorboard_folder and f"tensorboard --logdir {shlex.quote(str(tensorboard_folder))}"
        places = {
            "metrics": metrics_path,
            "curves": curves,
            "last checkpoint": checkpoint,
            "effective recipe": recipe,
        }
        if verb == "finished":
            places |= self._next_steps(checkpoint, metrics_path, only_weights=only_weights, plugins=plugins)
        return lines + [f"{name}: {place}" for name, place in places.items() if place is not None]

    def _next_steps(
        self,
        checkpoint: str | Path | None,
        metrics_path: str | Path | None,
        *,
        only_weights: bool,
        plugins: Sequence[str],
    ) -> dict[str, str]:
        """What can be done with a run that is finished, as commands."""
        steps = {}
        if checkpoint is not None:
            words = ["export", "--from", str(checkpoint), "--to", "exported"]
            words += ["--plugins", ",".join(plugins)] if plugins else []
            steps["export to Hugging Face"] = f"titan_growth {shlex.join(words)}"
            if not only_weights:
                steps["go on"] = "the same command with a larger training.steps"
        if metrics_path is not None and len(self.summary.validations) > 1:
            folder = Path(metrics_path).parent
            steps["plot"] = f"titan_growth plot {shlex.quote(f'{folder.name}={folder}')} --to curves.png"
        return steps

    def close(self) -> None:
        """Close all sinks; a second call does nothing."""
        sinks = dict.fromkeys((*self._sinks, *self._layer_sinks))
        self._sinks, self._layer_sinks = [], []
        for sink in sinks:
            sink.close()
