"""What a stage is: a technique applied to a plain model, one after another, in a declared order.

A stage is one class in one file. It names the stages that must run before it (`after`), checks a recipe without
devices (`check`), and transforms the model parts (`apply`). The order is not written down as code: it is the
topological sort of what the stages declare (`order.py`), printed by every run and pinned by a golden test. A plugin
adds a stage in the same way (docs/extending/adding_a_stage.md).

In this field "stage" also means a chunk of a pipeline. Here a chunk is a *part*.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from titan_growth.config.plugins import table_of
from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.section import Section
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import Problem

if TYPE_CHECKING:  # commands import this module, and report a typo in a recipe without loading torch
    from torch import Tensor

    from titan_growth.layout.mesh import Mesh
    from titan_growth.models.decoder import Decoder
    from titan_growth.models.layer_groups import ByGroup

ModelParts: TypeAlias = "list[Decoder]"
"""This rank's model parts: the whole model, or its chunks of a pipeline."""

Microbatch: TypeAlias = "dict[str, Tensor]"
"""`input` and `labels`, both (B, S) int64, and `positions` (B, S) if attention stays within documents."""


@dataclass(frozen=True)
class Transition:
    """The growth a model comes from."""

    growth: GrowthMap
    mask_steps: int
    """Steps over which the mask on new parameters opens; 0 for no mask."""
    step: int
    """The small model's last step."""

    def opening(self, step: int) -> float:
        """How far the mask is open at a step, from 0 to 1; already above 0 at the first step after the growth."""
        return min(1.0, max(0.0, (step - self.step) / self.mask_steps)) if self.mask_steps else 1.0


@dataclass(frozen=True)
class PlanContext:
    """What a stage sees while planning: arithmetic, no devices or process groups."""

    model_config: DecoderConfig
    mesh_shape: MeshShape
    device_type: str
    seq_len: int
    family: ModuleType
    """The model family's module, with its `fsdp_units` and `tensor_parallel_plan`."""
    transition: Transition | None = None
    """The growth the model comes from; None if it has not grown."""


@dataclass(frozen=True)
class BuildContext(PlanContext):
    """What a stage sees when the model is built and run: the plan's context, this rank's process groups, the step."""

    mesh: Mesh = field(kw_only=True)
    step: int = field(default=0, kw_only=True)
    """The training step that is under way; between two steps, and after a build, the last one done."""


@dataclass
class Stage(ABC):
    """One transformation of the model, applied once per build.

    A subclass is a dataclass whose fields are the recipe's tables that it reads, by their names. A plugin's stage also
    names its own TOML `table` and the `Section` of its `settings`; built-in tables are in the schema. Its public
    methods are those of this class, so that a misspelt one is found (`flaws.py`); helpers begin with `_`.

    Every method takes what it acts on, if anything, and then a context.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    table: ClassVar[str] = ""
    settings: ClassVar[type[Section] | None] = None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Stage:
        """The stage with its tables; it keeps nothing else of the recipe."""
        return cls(**{table.name: table_of(recipe, table.name) for table in fields(cls) if table.init})

    @abstractmethod
    def enabled(self, context: PlanContext) -> bool:
        """Whether the stage has anything to do in this context."""

    def check(self, context: PlanContext) -> Iterator[Problem]:
        """Problems with the settings; pure, needs no devices."""
        return iter(())

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        """Settings that are valid but do less than they suggest; pure like `check`."""
        return iter(())

    @abstractmethod
    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        """Transforms the parts, which are on the meta device."""

    def parameter_device(self, context: BuildContext) -> str | None:
        """Where parameters live, if not on the compute device."""
        return None

    def before_step(self, parts: ModelParts, context: BuildContext) -> None:
        """Called before each training step, whose number is in the context, and once after the build."""
        return None

    def prepare_microbatch(self, microbatch: Microbatch, context: BuildContext) -> Microbatch:
        """This rank's share of a microbatch, before it moves to the device."""
        return microbatch

    def train_context(self, context: BuildContext) -> contextlib.AbstractContextManager[Any]:
        """A context manager around forward, loss and backward."""
        return contextlib.nullcontext()

    def train_microbatch(self, train: Callable[[], Tensor], parts: ModelParts, context: BuildContext) -> Tensor:
        """Forward, loss and backward of a microbatch, or under a pipeline of a whole pass through the schedule.

        Args:
            train: does it, as often as it is called: gradients add up. Returns this rank's loss, as this must.
        """
        return train()

    def after_backward(self, parts: ModelParts, context: BuildContext) -> None:
        """Called when a step's gradients are complete, before clipping."""
        return None

    def after_optimizer_step(self, parts: ModelParts, context: BuildContext) -> None:
        """Called after each optimizer step, and in no step that is skipped; stages in reverse order of application."""
        return None

    def weights_replaced(self, parts: ModelParts, context: BuildContext) -> None:
        """Called when the weights were changed by something else: by shadow weights in their place, or by a growth that
        is being learned. Stages are called from the last to the first."""
        return None

    def update_shadow(self, shadow: Sequence[Tensor], weights: Sequence[Tensor], context: BuildContext) -> None:
        """Updates the stage's shadow weights in place, after each optimizer step. A stage with this method has some
        (engine/shadow.py), under its name.

        Args:
            shadow: this rank's shards of them, float32.
            weights: the shards of the model's own, in the same order.
        """
        return None

    @property
    def keeps_shadow(self) -> bool:
        """Whether the stage has shadow weights."""
        return type(self).update_shadow is not Stage.update_shadow

    def step_metrics(self, parts: ModelParts, context: BuildContext) -> dict[str, Any]:
        """Numbers for the line of a logged step, by fields of `StepRecord`; called on all ranks, which get the same."""
        return {}

    def layer_metrics(self, parts: ModelParts, context: BuildContext) -> dict[str, ByGroup]:
        """Numbers by layer for `layers.jsonl`, by metric and group; nothing on most steps.

        Called after each step on all ranks, which get the same.
        """
        return {}

    @abstractmethod
    def describe(self, context: PlanContext) -> str:
        """One line for the plan and the log."""


def never_due(key: str, interval: int, steps: int, done: str) -> Iterator[Problem]:
    """A warning for an interval that no step of the run reaches; `done` is what a stage then never does."""
    if interval > steps:
        yield Problem(key, f"{interval} is more than training.steps {steps}: nothing is {done}")
