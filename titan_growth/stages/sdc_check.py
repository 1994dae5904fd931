"""SDC check: finds devices that compute wrong numbers without an error (silent data corruption).

Every n steps the first microbatch (under a pipeline: the first pass through the schedule) is trained on twice. Loss and
gradients must be the same bits, on every rank. The first pass is then forgotten: its gradients are dropped before the
second begins, and random state and sums for the log are put back, so the run is bitwise that without the check.

A wrong number spreads. Through a reduction it reaches the gradients of other ranks, and through tensor parallelism
their activations. So both passes also leave a trace: a fingerprint of every layer's output and of the gradient that
arrives there. The rank with the earliest difference, in the order of the computation, is the one to suspect; only an
error in the gradient of a weight leaves no trace before it is summed over ranks, and the report says so.

What is found ends the run by default. Nobody knows how many wrong numbers went unnoticed since the last check, they are
in weights and moments already, and a device that has erred once errs again. "warn" goes on with the second pass.
"""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from titan_growth.config.schema.recipe import DebugConfig, TrainingConfig
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage, never_due
from titan_growth.stages.order import register_stage
from titan_growth.tools.bits import differ, fingerprint
from titan_growth.tools.collectives import gather_objects
from titan_growth.tools.errors import Problem, TrainingError
from titan_growth.tools.logs import logger
from titan_growth.tools.shards import local_of
from titan_growth.tools.text import many

INTERVAL = "debug.sdc_check_interval"


class Place(NamedTuple):
    """Where in a pass a number was computed; earlier ones are smaller."""

    is_backward: bool
    order: int
    """The layer, counted down in the backward pass; the loss is after all layers."""
    name: str


_SUMMED = Place(True, sys.maxsize, "gradients of parameters")
"""After everything else."""


@dataclass
class Pass:
    """What a forward and backward pass left on this rank."""

    trace: list[tuple[Place, Tensor]] = field(default_factory=list)
    """Fingerprints, in the order of the computation."""
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    loss: Tensor = field(init=False)


@dataclass(frozen=True)
class Difference:
    """What two passes do not agree on, on one rank."""

    rank: int
    device: str
    place: Place | None
    """The first place of the trace; None if only gradients of parameters differ."""
    parameters: tuple[str, ...]
    """Those whose gradients differ, in the order of the model."""

    @property
    def when(self) -> Place:
        """For sorting by time."""
        return _SUMMED if self.place is None else self.place

    def __str__(self) -> str:
        found = [] if self.place is None else [f"first {self.place.name}"]
        if self.parameters:
            found.append(f"the gradient of {self.parameters[0]} and {many(len(self.parameters) - 1, 'other')}")
        return f"rank {self.rank} ({self.device}): {', '.join(found)}"


@register_stage
@dataclass
class SDCCheck(Stage):
    """Trains on a microbatch twice and compares."""

    name: ClassVar[str] = "sdc_check"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "tensor_parallel", "activation_checkpoint", "compile")

    debug: DebugConfig
    training: TrainingConfig
    _is_due: bool = field(init=False, default=False)
    _passed: int | None = field(init=False, default=None)
    """The last step whose check found nothing."""
    _recorded: Pass | None = field(init=False, default=None)
    """The pass that is under way, while a check is."""

    def enabled(self, context: PlanContext) -> bool:
        return self.debug.sdc_check_interval > 0

    def check(self, context: PlanContext) -> Iterator[Problem]:
        if context.device_type == "cuda" and not self.debug.deterministic:
            message = "needs debug.deterministic = true on CUDA, where some kernels give other bits each time otherwise"
            yield Problem(INTERVAL, message, "Set it, or sdc_check_interval = 0")

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        yield from never_due(INTERVAL, self.debug.sdc_check_interval, self.training.steps, "checked")
        if context.device_type == "cuda" and self.debug.deterministic_warn_only:
            message = "lets kernels run that give other bits each time, which the SDC check takes for corruption"
            yield Problem("debug.deterministic_warn_only", message, "Set it to false")

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        num_layers = context.model_config.num_layers
        for part in parts:
            for layer, block in part.layers.items():
                forward = Place(False, int(layer), f"the output of layers.{layer}")
                backward = Place(True, num_layers - int(layer), f"the gradient at the output of layers.{layer}")
                block.register_forward_hook(functools.partial(self._record, forward, backward))
        return parts

    def _record(self, forward: Place, backward: Place, _block: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Forward hook of a layer: fingerprints of its output and, later, of the gradient there."""
        if (recorded := self._recorded) is None or not torch.is_grad_enabled():
            return
        recorded.trace.append((forward, fingerprint(local_of(output).detach())))

        def on_gradient(gradient: Tensor) -> None:
            recorded.trace.append((backward, fingerprint(local_of(gradient))))

        output.register_hook(on_gradient)

    def before_step(self, parts: ModelParts, context: BuildContext) -> None:
        self._is_due = context.step % self.debug.sdc_check_interval == 0

    def weights_replaced(self, parts: ModelParts, context: BuildContext) -> None:
        self._is_due = False  # the steps of a learned growth are not announced, and not checked

    def train_microbatch(self, train: Callable[[], Tensor], parts: ModelParts, context: BuildContext) -> Tensor:
        if not self._is_due:
            return train()
        self._is_due = False
        random, sums = _RandomState(), [(total, total.clone()) for part in parts for total in part.sums.values()]
        first = self._traced(train, parts, context)
        for parameter in _parameters(parts).values():
            parameter.grad = None
        for total, before in sums:
            total.copy_(before)
        random.restore()
        second = self._traced(train, parts, context)
        found = [one for one in gather_objects(_difference(first, second, context)) if one is not None]
        if not found:
            self._passed = context.step
            return second.loss
        message = _report(found, context.step, self._passed)
        if self.debug.sdc_check_action == "stop":
            raise TrainingError(message)
        if context.mesh.device_mesh.get_rank() == 0:
            logger.warning("%s", message)
        return second.loss

    def _traced(self, train: Callable[[], Tensor], parts: ModelParts, context: BuildContext) -> Pass:
        parameters = _parameters(parts)
        assert all(parameter.grad is None for parameter in parameters.values()), "gradients were there before the step"
        self._recorded = recorded = Pass()
        try:
            recorded.loss = train()
        finally:
            self._recorded = None
        recorded.trace.append((Place(False, context.model_config.num_layers, "the loss"), fingerprint(recorded.loss)))
        recorded.gradients = {
            name: None if parameter.grad is None else local_of(parameter.grad) for name, parameter in parameters.items()
        }
        return recorded

    def describe(self, context: PlanContext) -> str:
        what = "pass through the pipeline" if context.mesh_shape.pp > 1 else "microbatch"
        then = "stops the run" if self.debug.sdc_check_action == "stop" else "is warned about"
        return f"sdc_check: every {self.debug.sdc_check_interval} steps a {what} is run twice; another bit {then}"


class _RandomState:
    """The random state of this process, to go back to."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def _parameters(parts: ModelParts) -> dict[str, nn.Parameter]:
    return {name: parameter for part in parts for name, parameter in part.named_parameters()}


def _difference(first: Pass, second: Pass, context: BuildContext) -> Difference | None:
    """What differs on this rank. The device is waited for once."""
    places = [place for place, _ in first.trace]
    assert places == [place for place, _ in second.trace], "two passes over one microbatch took different ways"
    names, flags = list(first.gradients), []
    for name in names:
        one, other = first.gradients[name], second.gradients[name]
        assert (one is None) == (other is None), f"only one of two passes gave {name} a gradient"
        flags.append(torch.tensor(False) if one is None or other is None else differ(one, other))
    flags += [differ(one, other) for (_, one), (_, other) in zip(first.trace, second.trace, strict=True)]
    device = context.mesh.device_type
    differs = torch.stack([flag.to(device) for flag in flags]).tolist()
    if not any(differs):
        return None
    wrong = [place for place, is_wrong in zip(places, differs[len(names) :], strict=True) if is_wrong]
    where = f"{device}:{torch.cuda.current_device()}" if device == "cuda" else device
    return Difference(
        context.mesh.device_mesh.get_rank(),
        f"{where} of {socket.gethostname()}",
        min(wrong, default=None),
        tuple(name for name, is_wrong in zip(names, differs, strict=False) if is_wrong),
    )


def _report(found: Sequence[Difference], step: int, passed: int | None) -> str:
    """The message for people: who is suspected, who else differs, what to do."""
    earliest = min(one.when for one in found)
    suspects = [one for one in found if one.when == earliest]
    others = [str(one.rank) for one in found if one.when != earliest]
    message = f"step {step}: a microbatch gave other bits when it was run again (silent data corruption). "
    message += "; ".join(map(str, suspects[:4]))
    if len(suspects) > 4:
        message += f"; and {many(len(suspects) - 4, 'other rank')}"
    if others:
        message += f". It spread to {'ranks' if len(others) > 1 else 'rank'} {', '.join(others)}"
    if suspects[0].place is None:
        message += ". No layer's output differs: the cause may be any rank that this gradient is summed over"
    since = (
        "In this start of the run, or since its last growth, no check has passed before"
        if passed is None
        else f"Step {passed} passed"
    )
    return f"{message}. {since}; checkpoints after it may be damaged. Take the device out, and resume from one before"
