"""What a stage is: a technique that is composed onto a plain model, one after another, in a declared order.

A stage is one class in one file. It says which stages must have run before it (`after`), checks a recipe without
devices (`check`), and transforms the model parts (`apply`). The order of composition is nowhere written as code: it is
the topological sort of what the stages declare (`order.py`), printed by every run and pinned by a golden test. A plugin
adds a stage in the same way (docs/extending/adding_a_stage.md).

In this field "stage" also means a chunk of a pipeline. Here a chunk is a *part*.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.section import Section
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import Problem

if TYPE_CHECKING:  # the commands import this module; a typo in a recipe is reported without the wait for torch
    from torch import Tensor

    from titan_growth.layout.mesh import Mesh
    from titan_growth.models.decoder import Decoder

ModelParts: TypeAlias = "list[Decoder]"
"""The model parts of this rank: the whole model, or the chunks of it that a pipeline gives the rank."""

Microbatch: TypeAlias = "dict[str, Tensor]"
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
class PlanContext:
    """What a stage may look at while planning: arithmetic, without devices and process groups."""

    model_config: DecoderConfig
    mesh_shape: MeshShape
    device_type: str
    seq_len: int
    family: ModuleType
    """The model family's module, with its `fsdp_units` and `tensor_parallel_plan`."""
    transition: Transition | None = None
    """The growth that the model has come from; None for a model that has not grown."""


@dataclass(frozen=True)
class BuildContext(PlanContext):
    """What a stage may look at when the model is built and run: the same, and this rank's process groups."""

    mesh: Mesh = field(kw_only=True)


class Stage(ABC):
    """One transformation of the model, applied once per build.

    A stage of a plugin names its TOML `table` and the `Section` with its `settings`; our own tables are in the schema.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    table: ClassVar[str] = ""
    settings: ClassVar[type[Section] | None] = None

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: Recipe) -> Stage:
        """Takes the sections that the stage owns out of the recipe; nothing else of the recipe is kept."""

    @abstractmethod
    def enabled(self, context: PlanContext) -> bool:
        """Whether the stage does anything in this context."""

    def check(self, context: PlanContext) -> Iterator[Problem]:
        """Problems of the settings; pure, needs no devices."""
        return iter(())

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        """Settings that are allowed but do less than a reader would think; pure like `check`."""
        return iter(())

    @abstractmethod
    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        """Transforms the parts, which are on the meta device."""

    def parameter_device(self, context: BuildContext) -> str | None:
        """Where the parameters are to live, when that is not the device of the computation."""
        return None

    def before_step(self, parts: ModelParts, step: int) -> None:
        """Called when the model has been built, and before each training step, with the number of the step."""
        return None

    def prepare_microbatch(self, microbatch: Microbatch, context: BuildContext) -> Microbatch:
        """This rank's share of a microbatch, just before it is moved to the device."""
        return microbatch

    def train_context(self, context: BuildContext) -> contextlib.AbstractContextManager[Any]:
        """A context manager around forward, loss and backward."""
        return contextlib.nullcontext()

    def after_backward(self, parts: ModelParts, context: BuildContext) -> None:
        """Called when a step's gradients are complete, before they are clipped."""
        return None

    def after_optimizer_step(self, parts: ModelParts) -> None:
        """Called after each optimizer step."""
        return None

    @abstractmethod
    def describe(self, context: PlanContext) -> str:
        """One line for the plan and the log."""
