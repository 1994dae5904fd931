"""Stages: the techniques that are composed onto a plain model, one after another, in a declared order.

A stage is one class in one file. It says which stages must have run before it (`after`), checks a recipe without
devices (`check`), and transforms the model parts (`apply`). The order of composition is nowhere written as code: it is
the topological sort of what the stages declare, printed by every run and pinned by a golden test. A plugin adds a stage
in the same way (docs/adding_a_stage.md).

In this field "stage" also means a chunk of a pipeline. Here a chunk is a *part*.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol, runtime_checkable

from titan_growth.config.messages import suggestion
from titan_growth.config.plugins import PLUGINS_KEY, register_table, same_origin
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.section import Section
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.layout.mesh import Mesh, MeshShape
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import ConfigError, Problem

ModelParts = list[Any]
"""The model parts of this rank, as `nn.Module`s (typed loosely so that planning does not import torch)."""

Microbatch = dict[str, Any]
"""`input` and `labels`, both (B, S) int64, and `positions` (B, S) when attention stays inside documents."""


@dataclass(frozen=True)
class Transition:
    """A growth as the model after it sees it."""

    growth: GrowthMap
    mask_steps: int
    """Steps over which the mask of what is new opens; 0 without one."""
    step: int
    """The last step of the model before."""

    def opening(self, step: int) -> float:
        """How far the mask is open at a step: the first one after the growth is the first with anything new."""
        return min(1.0, max(0.0, (step - self.step) / self.mask_steps)) if self.mask_steps else 1.0


@dataclass(frozen=True)
class StageContext:
    """What a stage may look at."""

    model_config: DecoderConfig
    mesh_shape: MeshShape
    device_type: str
    seq_len: int
    family: Any
    """The model family's module, with its `fsdp_units` and `tensor_parallel_plan`."""
    mesh: Mesh | None = None
    """None while planning without process groups."""
    transition: Transition | None = None
    """The growth that the model has come from; None for a model that has not grown."""


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

    def before_step(self, parts: ModelParts, step: int) -> None:
        """Called when the model has been built, and before each training step, with the number of the step."""
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

    A stage of a plugin names its TOML `table` and the `Section` with its `settings`; our own tables are in the schema.
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

    def before_step(self, parts: ModelParts, step: int) -> None:
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

_OWN = "titan_growth.stages."
"""What the modules of our own stages begin with; each is called like its stage."""


def register_stage(stage: type[Any]) -> type[Any]:
    """Class decorator: makes a stage known under its name. A module that is imported again replaces its own stage.

    Raises:
        ConfigError: with everything that keeps the class from being a stage. Nothing has been registered then.
    """
    if problems := list(_flaws(stage)):
        raise ConfigError(problems)
    if getattr(stage, "settings", None) is not None:
        register_table(stage.table, stage.settings)
    _REGISTRY[stage.name] = stage
    return stage


def _flaws(stage: type[Any]) -> Iterator[Problem]:
    """What is wrong with a class that wants to be a stage; it is the plugin's author who reads this."""
    where = _origin(stage)
    name, after = getattr(stage, "name", None), getattr(stage, "after", ())
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
        yield Problem(
            where, f"needs a name of lower-case letters, digits and _, has {name!r}", 'Write name = "my_stage"'
        )
        return
    other = _REGISTRY.get(name)
    if not where.startswith(_OWN) and find_spec(_OWN + name) is not None:
        yield Problem(where, f"{name!r} is the name of a stage of titan_growth itself", "Give it another name")
    elif other is not None and not same_origin(other, stage):
        yield Problem(where, f"{_origin(other)} is called {name!r} already", "Give one of the two another name")
    if not (isinstance(after, tuple | list) and all(isinstance(item, str) for item in after)):
        yield Problem(where, f"`after` must be a tuple of names, is {after!r}", 'Write after = ("pipeline",)')
    wanted = [method for method in vars(Stage) if not method.startswith("_")]
    if missing := [method for method in wanted if not callable(getattr(stage, method, None))]:
        yield Problem(where, f"lacks {', '.join(missing)}", "Derive it from StageDefaults and write these methods")
    table, settings = getattr(stage, "table", ""), getattr(stage, "settings", None)
    if bool(table) != (settings is not None):
        given, lacking = ("table", "settings") if table else ("settings", "table")
        yield Problem(
            where, f"has `{given}` but no `{lacking}`", "Give both: the name of the TOML table and its Section"
        )


def _origin(stage: Any) -> str:
    return f"{stage.__module__}.{stage.__qualname__}"


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
        growth_mask,
        pipeline,
        tensor_parallel,
    )

    return dict(_REGISTRY)


def resolve_order(stages: dict[str, Any]) -> list[str]:
    """Names of the stages in the order they are applied.

    Each comes as early as its `after` allows. Where several could be next, those of plugins come before our own, in
    the order of their registration: so `fsdp`, which ends our own, comes after every stage that does not name it.

    Raises:
        ConfigError: when an `after` names no stage, or when they contradict each other.
    """
    unknown = [
        Problem(
            PLUGINS_KEY,
            f"the stage {name!r} is to come after {other!r}, which is no stage",
            suggestion(other, stages) or f"The stages are {', '.join(stages)}",
        )
        for name, stage in stages.items()
        for other in stage.after
        if other not in stages
    ]
    if unknown:
        raise ConfigError(unknown)
    sorter = TopologicalSorter({name: stage.after for name, stage in stages.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        message = f"the stages cannot be ordered: {' is to come after '.join(reversed(error.args[1]))}"
        raise ConfigError([Problem(PLUGINS_KEY, message, "Take one of these names out of an `after`")]) from None
    plugins_first = sorted(stages, key=lambda name: _origin(stages[name]).startswith(_OWN))
    place = {name: position for position, name in enumerate(plugins_first)}
    order: list[str] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        earliest = min(ready, key=place.__getitem__)
        ready.remove(earliest)
        order.append(earliest)
        sorter.done(earliest)
    return order


def stages_of(recipe: Recipe) -> list[Stage]:
    """Every registered stage with its settings from the recipe, in the order of application."""
    known = registered_stages()
    return [known[name].from_recipe(recipe) for name in resolve_order(known)]
