"""What a growth operator is, and the registry of them.

An operator is a pure function on configs: from the model before, and a stage of the recipe, to a `GrowthMap`, which
says of every layer and every channel of the grown model where it comes from. It never touches a tensor and needs no
device; the reader (`growth/read.py`) carries the map out on any mesh, and `growth/verify.py` checks what it did.

The operators of this package are in `depth.py`, `width.py` and `learn.py`. A plugin adds one with `@register_operator`
(docs/adding_an_operator.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, TypeVar

from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.axes import AxisMap
from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import Role


@dataclass(frozen=True, kw_only=True)
class GrowthMap:
    """Where everything in a grown model comes from.

    The map knows of tensors only their names and the axes of their dimensions; `growth/rules.py` makes of it the rule
    for a single tensor.
    """

    before: DecoderConfig
    after: DecoderConfig
    layers: tuple[int | None, ...]
    """Source layer of each layer; None for a layer that starts from its initial distribution."""
    axes: Mapping[str, AxisMap] = field(default_factory=dict)
    """The width axes that grow."""
    silent_copies: bool = False
    """Layers that are not the first copy of their source add nothing: their writing projections are zero."""
    new_channels: Literal["zero", "random"] = "zero"
    """What channels without a source do: nothing at first, or whatever their initial distribution makes them do."""
    rescale_norms: bool = False
    """Norm weights are multiplied by sqrt(d / D), and eps by d / D: new channels are silent and thin out the mean."""
    masked: bool = False
    """Everything new is multiplied by a mask that opens from 0 to 1 over `mask_steps` of the stage."""
    learned: bool = False
    """The map is only where a learning phase starts from (`growth/learn.py`)."""
    tolerance: float | None = None
    """Largest change of the loss, relative, that the operator allows itself: 0 for a model that computes bit for bit
    the same, a small number for one that does up to rounding, None for an operator that preserves nothing."""

    def __post_init__(self) -> None:
        assert len(self.layers) == self.after.num_layers, "one source for each layer of the grown model"
        for layer in self.layers:
            assert layer is None or 0 <= layer < self.before.num_layers, f"there is no layer {layer} to copy"

    @cached_property
    def is_original_layer(self) -> tuple[bool, ...]:
        """Whether a layer is the first one with its source; the others are copies, or new."""
        return tuple(
            source is not None and source not in self.layers[:layer] for layer, source in enumerate(self.layers)
        )

    def axes_of(self, role: Role) -> tuple[AxisMap | None, ...]:
        """The map of each dimension of a parameter; None where it does not grow."""
        return tuple(self.axes.get(axis) for axis in role.dims)

    @property
    def norm_scale(self) -> float:
        """What norm weights of the residual stream are multiplied with."""
        return (self.before.dim / self.after.dim) ** 0.5 if self.rescale_norms else 1.0


class Operator(Protocol):
    """What an operator provides."""

    grows: frozenset[str]
    """What it changes: "depth", "width" or both."""

    def base(self, after: DecoderConfig, stage: PlannedGrowth) -> DecoderConfig | str:
        """The model that the stage must start from to end at `after`; or why that cannot be worked out."""
        ...

    def grow(self, before: DecoderConfig, stage: PlannedGrowth) -> GrowthMap | str:
        """The map of a growth from `before`; or what is wrong with the stage for this model."""
        ...


_OPERATORS: dict[str, Operator] = {}

Kind = TypeVar("Kind", bound=type)


def register_operator(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: makes an operator known to recipes under a name. The class is instantiated without arguments.

    A module that is imported again replaces its own operator; another one's name cannot be taken.
    """

    def register(kind: Kind) -> Kind:
        other = type(_OPERATORS[name]) if name in _OPERATORS else None
        same = other is None or (other.__module__, other.__qualname__) == (kind.__module__, kind.__qualname__)
        assert same, f"two operators are called {name!r}"
        lacking = [wanted for wanted in ("base", "grow", "grows") if not hasattr(kind, wanted)]
        assert not lacking, f"the operator {name!r} lacks {', '.join(lacking)}"
        _OPERATORS[name] = kind()
        return kind

    return register


def operators() -> dict[str, Operator]:
    """All operators by name, those of this package included."""
    own = [f"titan_growth.growth.operators.{module}" for module in ("depth", "width", "learn")]
    for module in own:
        importlib.import_module(module)  # registers them
    place = {module: number for number, module in enumerate(own)}
    ordered = sorted(_OPERATORS.items(), key=lambda item: place.get(type(item[1]).__module__, len(own)))
    return dict(ordered)
