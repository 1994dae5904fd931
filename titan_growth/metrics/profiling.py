"""Profiles of single steps: chrome traces of what ran when, and snapshots of CUDA memory.

Profiling every step would slow the run and fill the disk. Of every `profile_freq` steps the last `profiler_active` are
recorded, after `profiler_warmup` steps whose data is dropped (starting the profiler is slow, and must not show in the
trace). Every rank writes its own file. Open a trace in Perfetto or chrome://tracing, a memory snapshot at
pytorch.org/memory_viz.

A profile that cannot be written is a logged warning and never ends the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from titan_growth.tools.logs import logger

_MAX_MEMORY_EVENTS = 100_000
"""Allocations and frees kept for a memory snapshot; PyTorch drops older ones."""


class Profiler:
    """Records steps as configured. Call `step()` after every training step and `close()` at the end.

    As a context manager it also writes a last snapshot (`iteration_<N>_exit`) when the block ends with CUDA out of
    memory; the error propagates.

    The cycle of `profile_freq` steps starts at `start_step`, where a resumed run continues. Files are
    `<dump_folder>/<save_traces_folder>/iteration_<N>/rank<R>_trace.json` and
    `<dump_folder>/<save_memory_snapshot_folder>/iteration_<N>/rank<R>_memory_snapshot.pickle`, written after step N. A
    run that ends while recording leaves a trace of what it has.
    """

    def __init__(
        self,
        *,
        enable_profiling: bool,
        dump_folder: str | Path,
        save_traces_folder: str,
        profile_freq: int,
        profiler_active: int,
        profiler_warmup: int,
        enable_memory_snapshot: bool,
        save_memory_snapshot_folder: str,
        rank: int,
        device_type: str,
        start_step: int = 0,
    ) -> None:
        self._traces = Path(dump_folder) / save_traces_folder
        self._snapshots = Path(dump_folder) / save_memory_snapshot_folder
        self._freq = profile_freq
        self._rank = rank
        self._start_step = self._step = start_step
        self._profile: Any = None
        self._records_memory = enable_memory_snapshot
        if enable_memory_snapshot:
            from titan_growth.tools.torch_private import record_memory_history

            record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        if enable_profiling:
            self._profile = self._started_profile(device_type, profiler_active, profiler_warmup)

    def _started_profile(self, device_type: str, active: int, warmup: int) -> Any:
        from torch import profiler

        activities = [profiler.ProfilerActivity.CPU]
        if device_type == "cuda":
            activities.append(profiler.ProfilerActivity.CUDA)
        # Warned about in every second cycle, but intended: each cycle has its own trace.
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events", category=UserWarning)
        profile = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(wait=self._freq - (active + warmup), warmup=warmup, active=active),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )
        profile.start()
        return profile

    def step(self) -> None:
        """Call after every training step; writes a trace or snapshot that is due."""
        self._step += 1
        if self._profile is not None:
            self._profile.step()
        if self._records_memory and (self._step - self._start_step) % self._freq == 0:
            self._write_snapshot(f"iteration_{self._step}")

    def close(self) -> None:
        """Stop recording; a second call does nothing."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
        if self._records_memory:
            from titan_growth.tools.torch_private import record_memory_history

            self._records_memory = False
            record_memory_history(enabled=None)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._records_memory and error is not None:
            import torch

            if isinstance(error, torch.OutOfMemoryError):
                # The current step is not counted yet.
                self._write_snapshot(f"iteration_{self._step + 1}_exit")
        self.close()

    def _write_trace(self, profile: Any) -> None:
        path = self._traces / f"iteration_{self._step}" / f"rank{self._rank}_trace.json"

        def export() -> None:
            profile.export_chrome_trace(str(path))
            # The C++ writer does not report a full disk, so check that the JSON is complete.
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - 64))
                if not file.read().rstrip().endswith(b"}"):
                    raise OSError("the file ends early (no space left on the device?)")

        self._write(path, export)

    def _write_snapshot(self, name: str) -> None:
        from titan_growth.tools.torch_private import dump_memory_snapshot

        path = self._snapshots / name / f"rank{self._rank}_memory_snapshot.pickle"
        self._write(path, lambda: dump_memory_snapshot(str(path)))

    def _write(self, path: Path, act: Callable[[], object]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            act()
        except (OSError, RuntimeError) as error:
            logger.warning("%s: profile not written: %s", path, getattr(error, "strerror", None) or error)
        else:
            logger.info("profile of step %d: %s", self._step, path)
