"""Sinks that draw curves: TensorBoard and Weights & Biases.

Tags are torchtitan's wherever it has one, so its dashboards show our runs; `flops`, `num_layers` and `growth/...` are
additions. Curves are a convenience, `metrics.jsonl` is the record: when the disk fills up mid-run, the board stops with
one warning and training goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_growth.metrics.records import Record
from titan_growth.tools.errors import ConfigError, RunFolderError
from titan_growth.tools.logs import logger
from titan_growth.tools.packages import missing_package


class TensorBoardSink:
    """Writes a TensorBoard event file into `folder`.

    `purge_step` is the first step this process will write, None for a fresh run: TensorBoard hides what an interrupted
    run wrote from that step on. A thread of the tensorboard package writes the event file; an error there (disk full)
    becomes one logged warning, after which the sink is silent.

    Raises:
        RunFolderError: the event file cannot be created.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self._writer: Any = None
        self._quiet = _QuietWriterThreads()
        try:
            # A logged step is a dozen points; a shorter queue would make training wait for the thread.
            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, max_queue=256, flush_secs=20)
        except OSError as error:
            self._quiet.end()
            raise RunFolderError(
                f"{self.folder}: cannot write TensorBoard events: {error.strerror or error}. Free space or fix the "
                "permissions, or set metrics.enable_tensorboard = false"
            ) from error

    def record(self, record: Record) -> None:
        for tag, value in record.scalars().items():
            self._call("add_scalar", tag, value, record.step)
        if record.event:
            self._call("add_text", record.event, record.console_line(), record.step)

    def close(self) -> None:
        # The thread reports an error at the next call on the writer; close() begins with a flush, so that counts.
        self._call("close")
        self._writer = None
        self._quiet.end()

    def _call(self, method: str, *arguments: object) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except Exception as error:  # an OSError, or the file layer's own type where TensorFlow is installed
            writer, self._writer = self._writer, None
            # Join the thread before the hook that keeps it quiet is removed.
            with contextlib.suppress(Exception):
                writer.file_writer.close()
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            logger.warning("TensorBoard events in %s stop here: %s", self.folder, reason)


class _QuietWriterThreads:
    """Suppresses the traceback of a tensorboard writer thread that ends with an error.

    Python hands a thread's uncaught exception to `threading.excepthook`, which prints it. The writer raises the same
    exception from its next call, where `TensorBoardSink` reports it, so the print is noise. Errors of other threads go
    to the previous hook.
    """

    def __init__(self) -> None:
        self._before = threading.excepthook
        self._hook = self._handle  # `end` compares identity, and each access makes a new bound method
        threading.excepthook = self._hook

    def end(self) -> None:
        if threading.excepthook is self._hook:
            threading.excepthook = self._before

    def _handle(self, args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__.partition(".")[0] != "tensorboard":
            self._before(args)


class WandbSink:
    """Logs to Weights & Biases under the same tags as TensorBoard; local files go to `folder`.

    `config` is shown as the run's configuration. Credentials and offline mode come from W&B's environment variables.

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
        if problem := missing_package("metrics.enable_wandb", "wandb", "set it to false"):
            raise ConfigError([problem])
        wandb = importlib.import_module("wandb")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{folder}: cannot be created for W&B files: {error.strerror or error}") from error
        self._run: Any = wandb.init(project=project, name=run_name, dir=str(folder), config=dict(config or {}))

    def record(self, record: Record) -> None:
        self._run.log(record.scalars(), step=record.step)

    def close(self) -> None:
        self._run.finish()
