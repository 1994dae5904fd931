"""How fast training goes: a meter that attributes every second of the run to one phase.

A clock that simply runs from log to log reports a slump whenever a checkpoint or a validation falls in between. So the
meter always knows which phase it is in. Time starts out as `train`; `with meter.data():` moves it to `data`, which
still counts as training time (waiting for data is a cost of training worth seeing), while `with meter.pause(name):`
moves it to a phase of its own that rates and step times leave out. Because each second lands in exactly one phase, the
phases add up to the wall-clock, which is what the closing summary prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from titan_growth.metrics.hardware import memory_gib, peak_flops_per_second

__all__ = ["Throughput", "Window", "memory_gib", "peak_flops_per_second"]

TRAIN = "train"
DATA = "data"

_KEEP = 0.9
"""How much of the smoothed step time each further step keeps: a memory of about ten steps."""


@dataclass(frozen=True)
class Window:
    """What happened between two logs. `seconds` excludes pauses and includes `data_seconds`; tokens are of all ranks.

    `step_seconds` is the mean time of a step, `data_seconds_per_step` its part spent waiting for data; `mfu` is a
    fraction. With no step in the window, or no time, the rates are 0.
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
    `on_phase` is told the name of each phase that begins, or goes on.

    The clock runs from construction, or from `start()` where setting up takes place in between. Not thread-safe.

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
        """Forget everything so far and start counting now: call it right before the first step."""
        self._phases: list[str] = [TRAIN]
        self._mark = self._clock()
        self._seconds: dict[str, float] = {TRAIN: 0.0, DATA: 0.0}
        self._num_steps = 0
        self._tokens = 0
        self._flops = 0.0
        self._taken = (0, 0, 0.0, 0.0, 0.0)
        self._smoothed: float | None = None
        self._smoothed_steps = 0

    def count_step(self, *, tokens: int, flops_per_token: float) -> None:
        """One training step is done. `tokens` of all ranks; `flops_per_token` of the model that did it."""
        self._num_steps += 1
        self._tokens += tokens
        # Summed per step, not multiplied at the end: a growth changes the FLOPs per token within a window.
        self._flops += tokens * flops_per_token

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time spent waiting for training data. Within a pause it changes nothing: that time is the pause's."""
        if self._phases[-1] != TRAIN:
            yield
            return
        with self._phase(DATA):
            yield

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Time that is not training (`validation`, `checkpoint`, `growth`, ...): kept under `name`, out of the rates.

        Pauses nest; the innermost gets the time.
        """
        if name in (TRAIN, DATA):
            raise ValueError(f"{name!r} is not a pause")
        with self._phase(name):
            yield

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._settle()
        self._phases.append(name)
        self._tell()
        try:
            yield
        finally:
            self._settle()
            self._phases.pop()
            self._tell()

    def _tell(self) -> None:
        if self._on_phase is not None:
            self._on_phase(self._phases[-1])

    def _settle(self) -> None:
        """Book the time since the last change of phase to the phase it was spent in."""
        now = self._clock()
        phase = self._phases[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def take(self) -> Window:
        """The window since the last `take()` (or the start), and begin the next one."""
        self._settle()
        data = self._seconds[DATA]
        now = (self._num_steps, self._tokens, self._flops, self._seconds[TRAIN] + data, data)
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
        # The first step compiles, allocates and opens files; it may seed an estimate but must not linger in it.
        if self._smoothed is None or self._smoothed_steps <= 1:
            self._smoothed = window.step_seconds
        else:
            keep = _KEEP**window.num_steps
            self._smoothed = keep * self._smoothed + (1.0 - keep) * window.step_seconds
        self._smoothed_steps += window.num_steps

    def forget_step_time(self) -> None:
        """The model changed (a growth): the next window alone decides how long a step takes from now on."""
        self._smoothed_steps = 0

    def eta_seconds(self, num_steps_left: int) -> float:
        """Estimated training seconds of `num_steps_left` more steps, pauses not included; NaN before any window."""
        return float("nan") if self._smoothed is None else self._smoothed * max(0, num_steps_left)

    @property
    def num_steps(self) -> int:
        """Steps counted since the start."""
        return self._num_steps

    @property
    def tokens(self) -> int:
        """Tokens counted since the start, all ranks."""
        return self._tokens

    def mean_tokens_per_second(self) -> float:
        """All counted tokens over all training time (waiting for data included, pauses not)."""
        seconds = self._training_seconds()
        return self._tokens / seconds if seconds > 0 else 0.0

    def mean_mfu(self) -> float:
        """Model FLOPs utilisation over all training time, as a fraction."""
        seconds = self._training_seconds()
        return self._flops / seconds / self._peak if seconds > 0 else 0.0

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase since the start: `train`, `data` and every pause so far. They sum to the wall-clock."""
        self._settle()
        return dict(self._seconds)

    def _training_seconds(self) -> float:
        self._settle()
        return self._seconds[TRAIN] + self._seconds[DATA]
