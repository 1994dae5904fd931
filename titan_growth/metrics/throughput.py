"""Training speed: a meter that attributes every second of the run to one phase.

Timing from log to log would report a slump whenever a checkpoint or validation falls in between. So the meter always
knows its phase. Time is `train` by default; `with meter.data():` books it as `data`, which still counts as training
time, because waiting for data is a cost of training; `with meter.pause(name):` books it under `name`, outside rates
and step times. Each second lands in exactly one phase, so the phases add up to the wall-clock in the closing summary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

TRAIN = "train"
DATA = "data"

_KEEP = 0.9
"""Smoothing of the step time, per step: a memory of about ten steps."""


@dataclass(frozen=True)
class Window:
    """What happened between two logs. `seconds` excludes pauses and includes `data_seconds`; tokens are of all ranks.

    `step_seconds` is the mean time of a step, `data_seconds_per_step` the part spent waiting for data, `data_share`
    that part as a fraction. `mfu` is a fraction. Rates are 0 without steps or time.
    """

    num_steps: int
    tokens: int
    seconds: float
    data_seconds: float
    tokens_per_second: float
    mfu: float

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.num_steps if self.num_steps else 0.0

    @property
    def data_seconds_per_step(self) -> float:
        return self.data_seconds / self.num_steps if self.num_steps else 0.0

    @property
    def data_share(self) -> float:
        return self.data_seconds / self.seconds if self.seconds > 0 else 0.0


class Throughput:
    """Counts tokens and seconds. `peak_flops` is one device's peak in FLOP/s, `num_devices` how many train together.
    `on_phase` is called with the name of each phase that begins or resumes.

    The clock runs from construction, or from `start()` if called later. Not thread-safe.

    Raises:
        ValueError: `peak_flops` or `num_devices` is not positive.
    """

    def __init__(
        self,
        *,
        peak_flops: float,
        num_devices: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], object] | None = None,
    ) -> None:
        if peak_flops <= 0 or num_devices < 1:
            raise ValueError(f"peak_flops and num_devices must be positive, got {peak_flops} and {num_devices}")
        self._peak = peak_flops * num_devices
        self._clock = clock
        self._on_phase = on_phase
        self.start()

    def start(self) -> None:
        """Reset everything and start counting; call right before the first step."""
        self._phases: list[str] = [TRAIN]
        self._mark = self._clock()
        self._seconds: dict[str, float] = {TRAIN: 0.0, DATA: 0.0}
        self.num_steps = 0
        self.tokens = 0
        """Of all ranks."""
        self._flops = 0.0
        self._taken = (0, 0, 0.0, 0.0, 0.0)
        self._smoothed: float | None = None
        self._smoothed_steps = 0

    def count_step(self, *, tokens: int, flops_per_token: float) -> None:
        """Call after every training step, logged or not. `tokens` are of all ranks."""
        self.num_steps += 1
        self.tokens += tokens
        # Summed per step: a growth changes the FLOPs per token within a window.
        self._flops += tokens * flops_per_token

    def data(self) -> AbstractContextManager[None]:
        """Time spent waiting for training data. Inside a pause the time stays the pause's."""
        return self._phase(DATA) if self._phases[-1] == TRAIN else nullcontext()

    def pause(self, name: str) -> AbstractContextManager[None]:
        """Time that is not training (`validation`, `checkpoint`, `growth`, ...): booked under `name`, not in rates.

        Pauses nest; the innermost gets the time.
        """
        if name in (TRAIN, DATA):
            raise ValueError(f"{name!r} is not a pause")
        return self._phase(name)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._enter([*self._phases, name])
        try:
            yield
        finally:
            self._enter(self._phases[:-1])

    def _enter(self, phases: list[str]) -> None:
        self._settle()
        self._phases = phases
        if self._on_phase is not None:
            self._on_phase(self._phases[-1])

    def _settle(self) -> None:
        """Book the time since the last phase change."""
        now = self._clock()
        phase = self._phases[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def take(self) -> Window:
        """Returns the window since the last `take()` (or the start), and begins the next."""
        self._settle()
        data = self._seconds[DATA]
        now = (self.num_steps, self.tokens, self._flops, self._seconds[TRAIN] + data, data)
        num_steps, tokens, flops, seconds, data_seconds = (b - a for a, b in zip(self._taken, now, strict=True))
        self._taken = now
        window = Window(
            num_steps=int(num_steps),
            tokens=int(tokens),
            seconds=seconds,
            data_seconds=data_seconds,
            tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
            mfu=flops / seconds / self._peak if seconds > 0 else 0.0,
        )
        self._smooth(window)
        return window

    def _smooth(self, window: Window) -> None:
        if window.num_steps == 0:
            return
        # The first step compiles, allocates and opens files: it seeds the estimate, then is dropped from it.
        if self._smoothed is None or self._smoothed_steps <= 1:
            self._smoothed = window.step_seconds
        else:
            keep = _KEEP**window.num_steps
            self._smoothed = keep * self._smoothed + (1.0 - keep) * window.step_seconds
        self._smoothed_steps += window.num_steps

    def forget_step_time(self) -> None:
        """After a growth: estimate the step time anew from the next window alone."""
        self._smoothed_steps = 0

    def eta_seconds(self, num_steps_left: int) -> float:
        """Estimated training seconds for `num_steps_left` more steps, pauses excluded; NaN before any window."""
        return float("nan") if self._smoothed is None else self._smoothed * max(0, num_steps_left)

    def mean_tokens_per_second(self) -> float:
        """All counted tokens over all training time (waiting for data included, pauses not)."""
        seconds = self._training_seconds()
        return self.tokens / seconds if seconds > 0 else 0.0

    def mean_mfu(self) -> float:
        """Model FLOPs utilisation over all training time, as a fraction."""
        seconds = self._training_seconds()
        return self._flops / seconds / self._peak if seconds > 0 else 0.0

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase since the start: `train`, `data` and every pause. They sum to the wall-clock."""
        self._settle()
        return dict(self._seconds)

    def _training_seconds(self) -> float:
        self._settle()
        return self._seconds[TRAIN] + self._seconds[DATA]
