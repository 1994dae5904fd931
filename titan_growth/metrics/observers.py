"""What observes a run on this rank: meter, recorder with its sinks, profiler, heartbeat marks.

None of it changes the computation. Callers use the public `meter`, `recorder` and `profiler` directly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from titan_growth.checkpoint.folder import StepFolder
from titan_growth.checkpoint.history import Progress
from titan_growth.config.schema.recipe import Recipe
from titan_growth.liveness.heartbeat import Heartbeat
from titan_growth.metrics.boards import TensorBoardSink, WandbSink
from titan_growth.metrics.hardware import peak_flops_per_second
from titan_growth.metrics.layers import offset_after
from titan_growth.metrics.profiling import Profiler
from titan_growth.metrics.recorder import Recorder
from titan_growth.metrics.records import DataRecord
from titan_growth.metrics.sinks import ConsoleSink, JsonlSink, Sink
from titan_growth.metrics.throughput import Throughput
from titan_growth.tools.device import Device
from titan_growth.tools.run_folder import LAYERS_FILE, METRICS_FILE, RECIPE_FILE, RunFolder


class Observers:
    """Meter, recorder and profiler of a recipe. Only rank 0 writes, unless `metrics.save_for_all_ranks` is on."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        device: Device,
        resumed: StepFolder | None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.rank = dist.get_rank()
        self.jsonl: JsonlSink | None = None
        self.heartbeat = heartbeat
        start_step = self.steps_done = resumed.step if resumed is not None else 0
        dry_run = recipe.comm.mode != "default"
        dtype = getattr(torch, recipe.training.mixed_precision_param)
        peak, self.peak_source = peak_flops_per_second(device.type, device.name, dtype)
        self.meter = Throughput(peak_flops=peak, num_devices=dist.get_world_size(), on_phase=self._mark)
        sinks: list[Sink] = []
        layer_sinks: list[Sink] = []
        boards: list[Sink] = []
        if self.rank == 0:
            sinks.append(ConsoleSink(recipe.metrics.disable_color_printing))
        if self.rank == 0 and not dry_run:
            self.jsonl = JsonlSink(folder.path / METRICS_FILE, resumed.manifest.metrics_offset if resumed else None)
            sinks.append(self.jsonl)
            layer_sinks += self._layers_file(resumed)
            if recipe.metrics.enable_wandb:
                boards.append(WandbSink(folder.path / "wandb", config=recipe.model_dump()))
        if recipe.metrics.enable_tensorboard and not dry_run and (self.rank == 0 or recipe.metrics.save_for_all_ranks):
            boards.append(TensorBoardSink(self._tensorboard_folder(), purge_step=start_step + 1))
        self.recorder = Recorder(
            sinks=[*sinks, *boards],
            layer_sinks=[*layer_sinks, *boards],
            meter=self.meter,
            log_freq=recipe.metrics.log_freq,
            total_steps=recipe.training.steps,
            device_type=device.type,
            seconds_before=resumed.manifest.seconds if resumed is not None else 0.0,
        )
        if resumed is not None and self.jsonl is not None:
            self.recorder.summary.load(self.jsonl.path, resumed_at=start_step)
        self.profiler = Profiler(
            **recipe.profiling.model_dump(),
            dump_folder=folder.path,
            rank=self.rank,
            device_type=device.type,
            start_step=start_step,
        )

    def _layers_file(self, resumed: StepFolder | None) -> list[Sink]:
        """The sink of layers.jsonl, if there is anything to write, to cut back or to move out of the way."""
        path, section = self.folder.path / LAYERS_FILE, self.recipe.metrics
        if not (section.layers_freq or section.attention_freq or path.is_file()):
            return []
        return [JsonlSink(path, None if resumed is None else offset_after(path, resumed.step))]

    def _tensorboard_folder(self) -> str:
        root = self.folder.path / self.recipe.metrics.save_tb_folder
        return str(root / f"rank_{self.rank}" if self.recipe.metrics.save_for_all_ranks else root)

    @property
    def metrics_offset(self) -> int:
        """Bytes of metrics.jsonl so far; 0 on a rank that does not write it."""
        return self.jsonl.offset if self.jsonl is not None else 0

    def start(self) -> None:
        """Call right before the first step."""
        self.meter.start()
        self._mark("train")

    def record_data(self, at: Progress, training: dict[str, Any], validation: dict[str, Any] | None) -> None:
        """Writes down what a run that starts afresh trains on; people read it in the log."""
        if self.jsonl is not None:
            reached = {"step": at.step, "tokens": at.tokens, "flops": at.flops}
            seconds = self.recorder.seconds
            data = DataRecord(training_data=training, validation_data=validation, **reached, seconds=seconds)
            self.jsonl.record(data)

    def end_of_step(self) -> None:
        """Call when a step and all that belongs to it is done."""
        self.profiler.step()
        self.steps_done += 1
        self._mark("train")

    def _mark(self, phase: str) -> None:
        """Publishes how far this rank is, for hang diagnosis."""
        if self.heartbeat is not None:
            self.heartbeat.mark(phase, self.steps_done + 1)

    def summary(self, progress: Progress, last_saved: StepFolder | None, *, completed: bool) -> list[str]:
        """What the run did and where to look."""
        tensorboard = self.recipe.metrics.enable_tensorboard
        return self.recorder.closing_summary(
            progress,
            verb="finished" if completed else "stopped",
            metrics_path=self.jsonl.path if self.jsonl is not None else None,
            tensorboard_folder=self.folder.path / self.recipe.metrics.save_tb_folder if tensorboard else None,
            checkpoint=last_saved.path if last_saved is not None else None,
            recipe=self.folder.path / RECIPE_FILE if self.jsonl is not None else None,
            only_weights=last_saved is not None and last_saved.manifest.model_only,
            plugins=self.recipe.plugins,
        )

    def close(self) -> None:
        """Flushes and closes everything."""
        self.profiler.close()
        self.recorder.close()
