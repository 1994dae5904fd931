"""Stages: the techniques that are composed onto a plain model, one after another, in a declared order.

A stage is one class in one file. It says which stages must have run before it (`after`), checks a recipe without
devices (`check`), and transforms the model parts (`apply`). The order of composition is nowhere written as code: it is
the topological sort of what the stages declare, printed by every run and pinned by a golden test.

In this field "stage" also means a chunk of a pipeline. Here a chunk is a *part*.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, ClassVar, Protocol, runtime_checkable

from titan_growth.config.plugins import register_table
from titan_growth.config.schema import Recipe
from titan_growth.config.section import Section
from titan_growth.mesh import Mesh, MeshShape
from titan_growth.models.config import ModelConfig
from titan_growth.tools.errors import Problem

ModelParts = list[Any]
"""The model parts of this rank, as `nn.Module`s (typed loosely so that planning does not import torch)."""

Microbatch = dict[str, Any]
"""`input` and `labels`, both (B, S) int64, and `positions` (B, S) when attention stays inside documents."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may look at."""

    model_config: ModelConfig
    mesh_shape: MeshShape
    device_type: str
    seq_len: int
    family: Any
    """The model family's module, with its `fsdp_units` and `tensor_parallel_plan`."""
    mesh: Mesh | None = None
    """None while planning without process groups."""


@runtime_checkable
class Stage(Protocol):
    """One transformation of the model, applied once per build."""

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]]

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Stage:
        """Takes the sections that the stage owns out of the recipe; nothing else of the recipe is kept."""
        ...

    def enabled(self, context: StageContext) -> bool:
        """Whether the stage does anything in this context."""
        ...

    def check(self, context: StageContext) -> Iterator[Problem]:
        """Problems of the settings; pure, needs neither devices nor torch."""
        ...

    def warnings(self, context: StageContext) -> Iterator[Problem]:
        """Settings that are allowed but do less than a reader would think; pure like `check`."""
        ...

    def apply(self, parts: ModelParts, context: StageContext) -> ModelParts:
        """Transforms the parts, which are on the meta device."""
        ...

    def parameter_device(self, context: StageContext) -> str | None:
        """Where the parameters are to live, when that is not the device of the computation."""
        ...

    def prepare_microbatch(self, microbatch: Microbatch, context: StageContext) -> Microbatch:
        """This rank's share of a microbatch, just before it is moved to the device."""
        ...

    def train_context(self, context: StageContext) -> contextlib.AbstractContextManager[Any]:
        """A context manager around forward, loss and backward."""
        ...

    def after_backward(self, parts: ModelParts, context: StageContext) -> None:
        """Called when a step's gradients are complete, before they are clipped."""
        ...

    def after_optimizer_step(self, parts: ModelParts) -> None:
        """Called after each optimizer step."""
        ...

    def describe(self, context: StageContext) -> str:
        """One line for the plan and the log."""
        ...


class StageDefaults:
    """The parts of the protocol that most stages leave alone.

    A stage of a plugin names its TOML `table` and the `Section` with its `settings`; built-in tables are in the schema.
    """

    after: ClassVar[tuple[str, ...]] = ()
    table: ClassVar[str] = ""
    settings: ClassVar[type[Section] | None] = None

    def check(self, context: StageContext) -> Iterator[Problem]:
        return iter(())

    def warnings(self, context: StageContext) -> Iterator[Problem]:
        return iter(())

    def parameter_device(self, context: StageContext) -> str | None:
        return None

    def prepare_microbatch(self, microbatch: Microbatch, context: StageContext) -> Microbatch:
        return microbatch

    def train_context(self, context: StageContext) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def after_backward(self, parts: ModelParts, context: StageContext) -> None:
        return None

    def after_optimizer_step(self, parts: ModelParts) -> None:
        return None


_REGISTRY: dict[str, type[Stage]] = {}


def register_stage(stage: type[Any]) -> type[Any]:
    """Class decorator: makes a stage known under its name."""
    assert stage.name not in _REGISTRY, f"two stages are called {stage.name!r}"
    if getattr(stage, "settings", None) is not None:
        register_table(stage.table, stage.settings)
    _REGISTRY[stage.name] = stage
    return stage


def registered_stages() -> dict[str, type[Stage]]:
    """All known stages by name, those of this package included."""
    from titan_growth.stages import (  # noqa: F401  (importing registers them)
        activation_checkpoint,
        autocast,
        chunked_loss,
        compile,
        context_parallel,
        float8,
        fsdp,
        pipeline,
        tensor_parallel,
    )

    return dict(_REGISTRY)


def resolve_order(stages: dict[str, Any]) -> list[str]:
    """Names of the stages in the order they are applied; ties go by registration.

    Raises:
        ValueError: when the `after` declarations contradict each other.
    """
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for name, stage in stages.items():
        sorter.add(name, *(other for other in stage.after if other in stages))
    try:
        sorter.prepare()
    except CycleError as error:
        raise ValueError(f"stages cannot be ordered: {' -> '.join(error.args[1])}") from None
    order: list[str] = []
    rank = {name: position for position, name in enumerate(stages)}
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=rank.__getitem__)
        order += ready
        sorter.done(*ready)
    return order


def stages_of(recipe: Recipe) -> list[Stage]:
    """Every registered stage with its settings from the recipe, in the order of application."""
    known = registered_stages()
    return [known[name].from_recipe(recipe) for name in resolve_order(known)]
