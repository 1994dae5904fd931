"""Bad steps: a loss or gradient that is not finite, or far above those before it.

Between clipping and the optimizer's update a step's numbers are known and nothing has changed yet. There it is
accepted, skipped (gradients dropped, data counted as consumed), or rolled back with all steps since the last
checkpoint: the run resumes there with the batch after the bad one, so the data that led here is passed over.

The verdict uses only numbers that every rank has, so all agree. Its state (the window of accepted steps, the events so
far) is in each checkpoint's manifest, so an interrupted run decides as an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titan_growth.checkpoint.history import Progress
from titan_growth.checkpoint.manifest import Manifest
from titan_growth.checkpoint.rewind import RollBackError
from titan_growth.config.schema.stability import StabilityConfig
from titan_growth.engine.optimizer import Optimizer
from titan_growth.tools.errors import TrainingError, require_finite
from titan_growth.tools.logs import logger

NAMES = ("loss", "gradient norm")


class Stability:
    """Updates the weights, except after a bad step.

    Args:
        section: `[stability]`.
        holds_out: growths are judged on a held-out batch, not on the next training batch.
    """

    def __init__(self, section: StabilityConfig, *, holds_out: bool) -> None:
        self.section = section
        self.holds_out = holds_out
        self.events: list[dict[str, Any]] = []
        """Skipped and rolled back steps of the run so far."""
        self.skipped = ""
        """Why this step did not update the weights; empty when it did."""
        self._window: list[list[float]] = []

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over the state in a checkpoint's manifest."""
        self.events = list(state.get("events", []))
        self._window = [list(pair) for pair in state.get("window", [])]

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        kept = {"events": self.events, "window": self._window}
        return {key: value for key, value in kept.items() if value}

    def forget(self) -> None:
        """The model has grown: earlier losses and gradients no longer compare."""
        self._window = []

    def update(
        self, optimizer: Optimizer, progress: Progress, cursor: int, loss: Tensor, lr: float, fresh_share: float
    ) -> Tensor:
        """Clips the gradients and updates the weights, unless the step is bad.

        Args:
            progress: before this step.
            cursor: of the data, after this step's batch.
            loss: of this step, the same on every rank.
            lr, fresh_share: see `Optimizer.step`.

        Returns:
            The gradient norm before clipping.

        Raises:
            RollBackError: when the run must resume from an earlier checkpoint.
            TrainingError: when it must end.
        """
        norm = optimizer.clip()
        self.skipped = ""
        if self.section.looks:
            values = torch.stack([loss.detach().float(), norm.to(loss.device)]).tolist()
            self._judge(progress.step + 1, values, cursor)
        if self.skipped:
            optimizer.drop()
        else:
            optimizer.step(lr, fresh_share)
        return norm

    def require_finite(self, step: int, loss: float, gradient_norm: float) -> None:
        """Raises TrainingError when an accepted step was not finite."""
        if not self.skipped:
            require_finite(step, loss=loss, gradient_norm=gradient_norm)

    def _judge(self, step: int, values: Sequence[float], cursor: int) -> None:
        action: str = self.section.spike
        reason = self._spike(values)
        if not all(math.isfinite(value) for value in values):
            action = self.section.nonfinite
            reason = ", ".join(f"{name} {value}" for name, value in zip(NAMES, values, strict=True))
        if reason:
            if action == "stop":
                require_finite(step, loss=values[0], gradient_norm=values[1])
            if action in ("skip", "roll_back"):
                self._act(step, action, reason, cursor)
                return
            logger.warning("step %d: %s", step, reason)
        if self.section.spike != "ignore":
            self._window = [*self._window, list(values)][-self.section.spike_window :]

    def _spike(self, values: Sequence[float]) -> str:
        """Why a step is a spike; empty when it is none."""
        count = len(self._window)
        if self.section.spike == "ignore" or count < self.section.spike_window / 4:
            return ""
        for name, value, past in zip(NAMES, values, zip(*self._window, strict=True), strict=True):
            mean = math.fsum(past) / count
            deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in past) / (count - 1))
            if deviation > 0 and value > mean + self.section.spike_sigmas * deviation:
                return (
                    f"{name} {value:.4g} is {(value - mean) / deviation:.1f} standard deviations above the mean "
                    f"{mean:.4g} of the last {count} steps"
                )
        return ""

    def _act(self, step: int, action: str, reason: str, cursor: int) -> None:
        limit = self.section.max_events
        if len(self.events) >= limit:
            before = "; ".join(f"step {event['step']} ({event['action']}: {event['reason']})" for event in self.events)
            raise TrainingError(
                f"step {step}: {reason}. {limit} steps have been skipped or rolled back before, which is all that "
                f"stability.max_events allows: {before}"
            )
        event = {"step": step, "action": action, "reason": reason, "to_samples": cursor}
        count = f"({len(self.events) + 1} of at most {limit})"
        if action == "skip":
            logger.warning("step %d is skipped: %s %s", step, reason, count)
            self.events = [*self.events, event]
            self.skipped = reason
            return
        logger.warning("step %d is taken back: %s %s", step, reason, count)
        raise RollBackError(f"step {step} ({reason})", lambda manifest: self._past_the_data(manifest, event))

    def _past_the_data(self, manifest: Manifest, event: dict[str, Any]) -> Manifest:
        """The manifest of the checkpoint to resume from, with the data cursor after the bad batch."""
        event = {**event, "from_step": manifest.progress.step, "from_samples": manifest.progress.samples}
        return replace(
            manifest,
            progress=replace(manifest.progress, samples=event["to_samples"]),
            # With nothing held out it is the loss of the next batch, which has changed.
            held_out_loss=manifest.held_out_loss if self.holds_out else None,
            stability={**manifest.stability, "events": [*self.events, event]},
        )
