"""`build()`: from (model config, mesh, stages) to a model on its device. Start-up, resume and growth all call it.

    meta device -> stages in their declared order -> materialise -> weights

It keeps no state between calls: another depth or mesh is another call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titan_growth.engine.shadow import Shadow
from titan_growth.layout.mesh import Mesh
from titan_growth.models.config import DecoderConfig
from titan_growth.models.initialize import init_weights
from titan_growth.models.layer_groups import ByGroup
from titan_growth.models.registry import family_module
from titan_growth.stages.base import BuildContext, Microbatch, ModelParts, Stage, Transition
from titan_growth.stages.flaws import strange_answer
from titan_growth.tools.errors import ConfigError


@dataclass
class BuiltModel:
    """This rank's model parts and the stages applied to them."""

    parts: ModelParts
    stages: list[Stage]
    context: BuildContext
    """With the step that the run is at."""
    shadows: list[Shadow] = field(default_factory=list)

    @contextmanager
    def train_context(self) -> Iterator[None]:
        """All stages' context managers, around a forward pass, its loss and its backward pass."""
        with ExitStack() as stack:
            for stage in self.stages:
                manager = stage.train_context(self.context)
                if not isinstance(manager, AbstractContextManager):
                    raise ConfigError([strange_answer(stage, "train_context", manager)])
                stack.enter_context(manager)
            yield

    def before_step(self, step: int) -> None:
        """All stages' hooks, before each training step and once after the build."""
        self.context = replace(self.context, step=step)
        for stage in self.stages:
            stage.before_step(self.parts, self.context)

    def prepare_microbatch(self, microbatch: Microbatch) -> Microbatch:
        """This rank's share of a microbatch."""
        for stage in self.stages:
            microbatch = stage.prepare_microbatch(microbatch, self.context)
            if not isinstance(microbatch, dict):
                raise ConfigError([strange_answer(stage, "prepare_microbatch", microbatch)])
        return microbatch

    def train_microbatch(self, train: Callable[[], Tensor]) -> Tensor:
        """This rank's loss of a microbatch, whose gradients `train` adds to the parameters'."""
        for stage in self.stages:
            train = partial(self._train_microbatch, stage, train)
        return train()

    def _train_microbatch(self, stage: Stage, train: Callable[[], Tensor]) -> Tensor:
        loss: object = stage.train_microbatch(train, self.parts, self.context)
        if not isinstance(loss, Tensor):
            raise ConfigError([strange_answer(stage, "train_microbatch", loss)])
        return loss

    def after_backward(self) -> None:
        """All stages' hooks, when a step's gradients are complete."""
        for stage in self.stages:
            stage.after_backward(self.parts, self.context)

    def after_optimizer_step(self) -> None:
        """All stages' hooks, after each optimizer step; backwards, so that Float8 comes after what changes weights."""
        for stage in reversed(self.stages):
            stage.after_optimizer_step(self.parts, self.context)
        for shadow in self.shadows:
            shadow.update(self.context)

    def weights_replaced(self) -> None:
        """All stages' hooks, after any other change of the weights."""
        for stage in reversed(self.stages):
            stage.weights_replaced(self.parts, self.context)

    @contextmanager
    def with_shadow(self, shadow: Shadow) -> Iterator[None]:
        """Shadow weights in place of the model's own."""
        with shadow.in_place():
            self.weights_replaced()
            yield
        self.weights_replaced()

    def start_shadows(self, filled: Collection[str] = ()) -> list[str]:
        """Makes shadow weights equal to the weights, except those that have been filled.

        Args:
            filled: names of tensors.

        Returns:
            The kinds that start here.
        """
        starting = [shadow for shadow in self.shadows if not shadow.tensors.keys() <= set(filled)]
        for shadow in starting:
            shadow.start()
        return [shadow.kind for shadow in starting]

    def step_metrics(self) -> dict[str, Any]:
        """What the stages have measured in a step, by fields of its record. All ranks call it."""
        return self._measured("step_metrics")

    def layer_metrics(self) -> dict[str, ByGroup]:
        """What the stages have measured in a step by layer, if anything: metric -> group. All ranks call it."""
        return self._measured("layer_metrics")

    def _measured(self, method: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for stage in self.stages:
            measured = getattr(stage, method)(self.parts, self.context)
            if not isinstance(measured, dict):
                raise ConfigError([strange_answer(stage, method, measured)])
            found |= measured
        return found


def build(
    model_config: DecoderConfig,
    *,
    family: str,
    mesh: Mesh,
    stages: list[Stage],
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
    seed: int | None,
    transition: Transition | None = None,
) -> BuiltModel:
    """Builds this rank's parts of a model.

    Args:
        transition: the growth the model comes from, if it has grown.
        seed: of the initial weights; None leaves them uninitialised, for a model about to be loaded.

    Raises:
        ConfigError: when a stage of a plugin returns something else than what its method is for.
    """
    module = family_module(family)
    context = BuildContext(model_config, mesh.shape, device.type, seq_len, module, transition, mesh=mesh)
    with torch.device("meta"):
        whole = module.Decoder(model_config, seq_len).to(dtype)
    parts: ModelParts = [whole]
    active = [stage for stage in stages if stage.enabled(context)]
    for stage in active:
        parts = stage.apply(parts, context)
        if not isinstance(parts, list) or not all(isinstance(part, nn.Module) for part in parts):
            raise ConfigError([strange_answer(stage, "apply", parts)])
    # A stage may keep parameters elsewhere (host memory); buffers stay on the compute device.
    home = next((place for stage in active if (place := stage.parameter_device(context))), None)
    for part in parts:
        part.to_empty(device=home or device)
        part.materialized(device)
        part.train()
    model = BuiltModel(parts, active, context, [Shadow(stage, parts) for stage in active if stage.keeps_shadow])
    if seed is not None:
        init_weights(parts, lambda name: module.init_rule(model_config, name), seed, model_config.tied)
        model.start_shadows()
    return model
