"""The one object that the training loop reports to.

`Metrics` decides which steps are logged, turns the loop's numbers and the meter's into records, hands these to the
sinks, and remembers enough to say at the end what the run did. The steps that are logged (the first, every
`log_freq`-th, the last) depend on the step's number alone: all ranks agree on them without talking, which matters
because getting a loss to log is a collective operation, and a resumed run logs exactly the steps that an uninterrupted
one would have.

Every rank builds a `Metrics`, but one rank alone is given the console and `metrics.jsonl`; a rank without sinks writes
nothing anywhere.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from titan_growth.metrics.formatting import format_duration
from titan_growth.metrics.hardware import memory_gib
from titan_growth.metrics.records import GrowthRecord, StepRecord, Timings, ValidationRecord
from titan_growth.metrics.sinks import Sink
from titan_growth.metrics.throughput import Throughput
from titan_growth.tools.logs import logger


class Metrics:
    """Records steps, validations and growths in `sinks` (empty on ranks that do not write).

    `meter` is fed by the loop through `count_step()`, `meter.data()` and `meter.pause()`. `total_steps` is the step the
    run ends at, `log_freq` the distance in steps between logs, `device_type` says whose memory is reported, and
    `seconds_before` is the wall-clock of the run until this process took over.

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
    ) -> None:
        if log_freq < 1:
            raise ValueError(f"log_freq must be at least 1, got {log_freq}")
        self.meter = meter
        self._sinks = list(sinks)
        self._log_freq = log_freq
        self._total_steps = total_steps
        self._device_type = device_type
        self.seconds_before = seconds_before
        self._validations: list[tuple[int, float]] = []
        self._growths: list[GrowthRecord] = []
        # Step, tokens and FLOPs that the run has come to, and the step this process took over at.
        self._reached = (0, 0, 0.0)
        self._resumed_at: int | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock of the run until now, over all the processes that led here."""
        return self.seconds_before + sum(self.meter.phase_seconds().values())

    def should_log(self, step: int) -> bool:
        """Whether `step` (counted from 1) is logged. The same answer on every rank."""
        return step == 1 or step == self._total_steps or step % self._log_freq == 0

    def count_step(self, *, tokens: int, flops_per_token: float) -> None:
        """To be called after every step, logged or not: `tokens` is of this step, over all ranks."""
        self.meter.count_step(tokens=tokens, flops_per_token=flops_per_token)

    def record_step(
        self,
        *,
        step: int,
        tokens: int,
        flops: float,
        loss: float,
        grad_norm: float,
        lr: float,
        num_layers: int,
        batch_hash: str | None = None,
        skipped: str | None = None,
    ) -> StepRecord | None:
        """Log a step if `should_log(step)` says so, or it was skipped; returns what was logged, or None.

        `tokens` and `flops` are totals since the run began. The loop may skip the call for steps that are not logged.

        Raises:
            RunFolderError: `metrics.jsonl` cannot be written.
        """
        self._reached = (step, tokens, flops)
        if not self.should_log(step) and skipped is None:
            return None
        window = self.meter.take()
        record = StepRecord(
            step=step,
            tokens=tokens,
            flops=flops,
            seconds=self.seconds,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_second=window.tokens_per_second,
            mfu=window.mfu,
            num_layers=num_layers,
            batch_hash=batch_hash,
            skipped=skipped,
        )
        memory, peak_memory = memory_gib(self._device_type)
        timings = Timings(
            step_seconds=window.step_seconds,
            data_seconds=window.data_seconds_per_step,
            memory_gib=memory,
            peak_memory_gib=peak_memory,
            eta_seconds=self.meter.eta_seconds(self._total_steps - step),
            step_total=self._total_steps,
        )
        for sink in self._sinks:
            sink.step(record, timings)
        return record

    def reach(self, *, step: int, tokens: int, flops: float) -> None:
        """Where the run has come to, for the summary; steps that are not logged count too."""
        self._reached = (step, tokens, flops)

    def record_validation(self, *, step: int, tokens: int, flops: float, validation_loss: float) -> ValidationRecord:
        """Log a validation. Raises RunFolderError where `metrics.jsonl` cannot be written."""
        record = ValidationRecord(
            step=step, tokens=tokens, flops=flops, seconds=self.seconds, validation_loss=validation_loss
        )
        self._validations.append((step, validation_loss))
        for sink in self._sinks:
            sink.validation(record)
        return record

    def record_growth(
        self,
        *,
        step: int,
        tokens: int,
        flops: float,
        from_layers: int,
        to_layers: int,
        loss_before: float,
        loss_after: float,
    ) -> GrowthRecord:
        """Log a growth, and start the estimate of a step's time anew: the grown model's steps take longer.

        Raises RunFolderError where `metrics.jsonl` cannot be written.
        """
        record = GrowthRecord(
            step=step,
            tokens=tokens,
            flops=flops,
            seconds=self.seconds,
            from_layers=from_layers,
            to_layers=to_layers,
            loss_before=loss_before,
            loss_after=loss_after,
        )
        self._growths.append(record)
        self.meter.forget_step_time()
        for sink in self._sinks:
            sink.growth(record)
        return record

    def load_history(self, metrics_path: str | Path, *, resumed_at: int) -> None:
        """After a resume, read what the run did before, so that the closing summary tells of all of it.

        Call it on the rank with sinks, once the file has been cut back to the checkpoint (`JsonlSink` does that). Lines
        that are not ours are passed over: the history only feeds the summary.
        """
        self._resumed_at = resumed_at
        try:
            lines = Path(metrics_path).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            logger.warning("%s: the run's history cannot be read: %s", metrics_path, error.strerror or error)
            return
        for line in lines:
            try:
                self._remember(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue

    def _remember(self, line: dict[str, object]) -> None:
        reached = (int(_number(line["step"])), int(_number(line["tokens"])), _number(line["flops"]))
        if line.get("event") == "growth":
            record = GrowthRecord(
                *reached,
                seconds=math.nan,
                from_layers=int(_number(line["from_layers"])),
                to_layers=int(_number(line["to_layers"])),
                loss_before=_number(line["loss_before"]),
                loss_after=_number(line["loss_after"]),
            )
            self._growths.append(record)
        elif "validation_loss" in line:
            self._validations.append((reached[0], _number(line["validation_loss"])))
        self._reached = max(self._reached, reached)

    def closing_summary(
        self,
        *,
        verb: str = "finished",
        metrics_path: str | Path | None = None,
        tensorboard_folder: str | Path | None = None,
        checkpoint: str | Path | None = None,
        recipe: str | Path | None = None,
    ) -> list[str]:
        """What the run did, one fact a line; paths that are None are left out.

        Speed, wall-clock and phases are of this process; the rest is of the whole run if `load_history` was called.
        """
        step, tokens, flops = self._reached
        phases = self.meter.phase_seconds()
        wall = sum(phases.values())
        resumed = "" if self._resumed_at is None else f" (resumed at step {self._resumed_at})"
        lines = [
            f"{verb}: step {step}/{self._total_steps}{resumed}, {tokens:,} tokens, {flops:.2e} FLOPs, "
            f"wall-clock {format_duration(wall)}"
        ]
        if self._validations:
            lines.append(_validation_summary(self._validations))
        for growth in self._growths:
            lines.append(
                f"growth: {growth.from_layers} -> {growth.to_layers} layers at step {growth.step}, "
                f"loss {growth.loss_before:.2f} before, {growth.loss_after:.2f} after"
            )
        if self.meter.num_steps:
            rate, mfu = self.meter.mean_tokens_per_second(), 100.0 * self.meter.mean_mfu()
            lines.append(f"speed: {rate:,.0f} tok/s on average, mfu {mfu:.1f}%")
        shares = [
            f"{name} {format_duration(seconds)} ({100.0 * seconds / wall if wall > 0 else 0.0:.0f}%)"
            for name, seconds in phases.items()
        ]
        lines.append(f"time: {', '.join(shares)}")
        if metrics_path is not None:
            lines.append(f"metrics: {metrics_path}")
        if tensorboard_folder is not None:
            lines.append(f"curves: tensorboard --logdir {shlex.quote(str(tensorboard_folder))}")
        if checkpoint is not None:
            lines.append(f"last checkpoint: {checkpoint}")
        if recipe is not None:
            lines.append(f"effective recipe: {recipe}")
        return lines

    def close(self) -> None:
        """Close all sinks; a second call does nothing."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()


def _number(value: object) -> float:
    """A number of a line read back; `null` was written for one that is not finite. Raises TypeError for the rest."""
    if value is None:
        return math.nan
    if isinstance(value, (int, float)):
        return value
    raise TypeError(f"not a number: {value!r}")


def _validation_summary(validations: Sequence[tuple[int, float]]) -> str:
    (first_step, first), (last_step, last) = validations[0], validations[-1]
    # NaN compares false with everything, so a diverged validation must be kept from being the "best".
    best_step, best = min(validations, key=lambda entry: math.inf if math.isnan(entry[1]) else entry[1])
    return (
        f"validation loss: first {first:.4f} (step {first_step}), last {last:.4f} (step {last_step}), "
        f"best {best:.4f} (step {best_step})"
    )
