"""Sinks that draw curves: TensorBoard and Weights & Biases.

Both use the tags of torchtitan wherever torchtitan has one, so that dashboards made for it show our runs; ours on top
are `flops`, `num_layers` and the `growth/...` marks. Curves are a convenience, `metrics.jsonl` is the record: when a
board's disk fills up mid-run, the board stops with one warning and training goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_growth.metrics.formatting import growth_line
from titan_growth.metrics.records import GrowthRecord, StepRecord, Timings, ValidationRecord
from titan_growth.tools.errors import ConfigError, Problem, RunFolderError
from titan_growth.tools.logs import logger


def step_scalars(record: StepRecord, timings: Timings) -> dict[str, float]:
    """Tag and value of every curve that a training step adds a point to."""
    waiting = 100.0 * timings.data_seconds / timings.step_seconds if timings.step_seconds > 0 else 0.0
    return {
        "loss_metrics/global_avg_loss": record.loss,
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "throughput(tps)": record.tokens_per_second,
        "mfu(%)": 100.0 * record.mfu,
        "time_metrics/end_to_end(s)": timings.step_seconds,
        "time_metrics/data_loading(s)": timings.data_seconds,
        "time_metrics/data_loading(%)": waiting,
        "memory/max_active(GiB)": timings.peak_memory_gib,
        "n_tokens_seen": float(record.tokens),
        "flops": float(record.flops),
        "num_layers": float(record.num_layers),
    }


def growth_scalars(record: GrowthRecord) -> dict[str, float]:
    """Tag and value of every curve that a growth adds a point to."""
    return {
        "growth/num_layers": float(record.to_layers),
        "growth/loss_before": record.loss_before,
        "growth/loss_after": record.loss_after,
    }


class TensorBoardSink:
    """Writes a TensorBoard event file into `folder`.

    `purge_step` is the first step that this process will write again, None for a fresh run: TensorBoard then hides what
    an interrupted run had written from that step on. The event file is written by a thread of the tensorboard package;
    an error there (disk full) becomes one logged warning, after which the sink is silent.

    Raises:
        RunFolderError: the event file cannot be created.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self._writer: Any = None
        self._quiet = _QuietWriterThreads()
        try:
            # A logged step is a dozen points: a queue shorter than that would make training wait for the thread.
            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, max_queue=256, flush_secs=20)
        except OSError as error:
            self._quiet.end()
            raise RunFolderError(
                f"{self.folder}: cannot write TensorBoard events: {error.strerror or error}. Free space or fix the "
                "permissions, or set metrics.enable_tensorboard = false"
            ) from error

    def step(self, record: StepRecord, timings: Timings) -> None:
        self._scalars(step_scalars(record, timings), record.step)

    def validation(self, record: ValidationRecord) -> None:
        self._scalars({"validation_metrics/loss": record.validation_loss}, record.step)

    def growth(self, record: GrowthRecord) -> None:
        self._scalars(growth_scalars(record), record.step)
        self._call("add_text", "growth", growth_line(record), record.step)

    def close(self) -> None:
        # The thread reports an error only to the next call on the writer; close() begins with a flush, so it does too.
        self._call("close")
        self._writer = None
        self._quiet.end()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._call("add_scalar", tag, value, step)

    def _call(self, method: str, *arguments: object) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except Exception as error:  # an OSError, or the file layer's own type where TensorFlow is installed
            writer, self._writer = self._writer, None
            # Ends the thread and waits for it, so that nothing of it outlives the hook that keeps it quiet.
            with contextlib.suppress(Exception):
                writer.file_writer.close()
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            logger.warning("TensorBoard events in %s stop here: %s", self.folder, reason)


class _QuietWriterThreads:
    """Keeps the tensorboard package's writer threads from printing a traceback when they end with an error.

    Python hands a thread's last exception to `threading.excepthook`, which prints it. The writer keeps the same
    exception and raises it from its next call, where `TensorBoardSink` reports it, so the print is only noise. The
    errors of all other threads pass to the hook that was there before.
    """

    def __init__(self) -> None:
        self._before = threading.excepthook
        self._hook = self._handle  # a bound method is a new object every time it is named; `end` compares identity
        threading.excepthook = self._hook

    def end(self) -> None:
        if threading.excepthook is self._hook:
            threading.excepthook = self._before

    def _handle(self, args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__.partition(".")[0] != "tensorboard":
            self._before(args)


class WandbSink:
    """Logs to Weights & Biases under the same tags as TensorBoard; local files go to `folder`.

    `config` is shown as the run's configuration. Credentials and offline mode are W&B's own environment variables.

    Raises:
        ConfigError: the optional package `wandb` is not installed.
        RunFolderError: `folder` cannot be created.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str = "titan_growth",
        run_name: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            hint = "Run pip install 'titan_growth[wandb]', or set it to false"
            problem = Problem("metrics.enable_wandb", "needs the package wandb, which is not installed", hint)
            raise ConfigError([problem]) from error
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{folder}: cannot be created for W&B files: {error.strerror or error}") from error
        self._run: Any = wandb.init(project=project, name=run_name, dir=str(folder), config=dict(config or {}))

    def step(self, record: StepRecord, timings: Timings) -> None:
        self._run.log(step_scalars(record, timings), step=record.step)

    def validation(self, record: ValidationRecord) -> None:
        self._run.log({"validation_metrics/loss": record.validation_loss}, step=record.step)

    def growth(self, record: GrowthRecord) -> None:
        self._run.log(growth_scalars(record), step=record.step)

    def close(self) -> None:
        self._run.finish()
