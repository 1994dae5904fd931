"""The interface of growth operators, and their registry.

An operator is a pure function on configs: from the model before and a planned growth to a `GrowthMap`, the source of
every layer and channel of the grown model. It never touches a tensor; `growth/read.py` carries the map out on any mesh,
and `growth/verify.py` checks the result. Ours are in the modules beside this one; a plugin adds
one with `@register_operator` (docs/extending/adding_an_operator.md).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, TypeVar

from titan_growth.config.plugins import origin_of, same_origin
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.axes import AxisMap
from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import Role
from titan_growth.tools.errors import ConfigError, Problem

ROUNDING = 1e-6
"""The tolerance of a growth that preserves the function up to the order of sums, or the rounding of a factor."""


@dataclass(frozen=True, kw_only=True)
class GrowthMap:
    """Where everything in a grown model comes from; `growth/rules.py` derives the rule of each tensor from it."""

    before: DecoderConfig
    after: DecoderConfig
    layers: tuple[int | None, ...]
    """Source layer of each layer; None for a layer that starts from its initial distribution."""
    axes: Mapping[str, AxisMap] = field(default_factory=dict)
    """The width axes that grow."""
    silent_copies: bool = False
    """Layers after the first copy of their source add nothing: their writing projections are zero."""
    new_channels: Literal["zero", "random"] = "zero"
    """Channels without a source do nothing at first, or start from their initial distribution."""
    rescale_norms: bool = False
    """Norm weights are multiplied by sqrt(d / D), and eps by d / D: silent new channels lower the mean."""
    masked: bool = False
    """Everything new is multiplied by a mask that opens from 0 to 1 over `mask_steps`."""
    learned: bool = False
    """The map is only where a learning phase starts from (`growth/ligo.py`)."""
    tolerance: float | None = None
    """Largest relative change of the loss: 0 for a model that computes bit for bit the same, a small number for one
    that does up to rounding, None for an operator that does not preserve the function."""

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
        """Factor on the norm weights of the residual stream."""
        return (self.before.dim / self.after.dim) ** 0.5 if self.rescale_norms else 1.0

    @property
    def depth_scale(self) -> float:
        """Ratio of the deviations with which writing projections start in the deeper and in the shallower model."""
        return (self.before.num_layers / self.after.num_layers) ** 0.5

    @property
    def copies_write(self) -> bool:
        """Whether there are copied layers that add something to the residual stream."""
        copied = zip(self.layers, self.is_original_layer, strict=True)
        return not self.silent_copies and any(source is not None and not first for source, first in copied)


class Operator(Protocol):
    """What an operator provides. `checked.py` asks it, and checks what it answers."""

    grows: frozenset[str]
    """What it changes: "depth", "width", both, or neither."""
    # Two more that may be left out:
    # options: frozenset[str], the names that [growth.stages.options] may have;
    # sets_size: bool, whether the operator itself says how large the model becomes.

    def base(self, after: DecoderConfig, planned: PlannedGrowth) -> DecoderConfig | str:
        """The model that the growth must start from to end at `after`; or why it cannot be derived."""
        ...

    def grow(self, before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap | str:
        """The map of a growth from `before`; or what is wrong with the planned growth for this model."""
        ...


_OPERATORS: dict[str, Operator] = {}

Kind = TypeVar("Kind", bound=type)

_OWN = tuple(f"titan_growth.growth.operators.{module}" for module in ("depth", "width", "learn", "identity"))
"""The modules of the operators of this package."""


def register_operator(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: registers an operator under a name. The class is instantiated without arguments.

    A module that is imported again replaces its own operator, and no other.

    Raises:
        ConfigError: with everything that is wrong with the class, which is then not registered.
    """
    if isinstance(name, type):
        hint = 'Write @register_operator("my_operator") above the class'
        raise ConfigError([Problem(origin_of(name), "is registered without a name", hint)])

    def register(kind: Kind) -> Kind:
        if getattr(kind, "__module__", None) not in _OWN:
            operators()  # so that the names of this package are taken
        if problems := list(_flaws(name, kind)):
            raise ConfigError(problems)
        _OPERATORS[name] = kind()
        return kind

    return register


def _flaws(name: str, kind: type) -> Iterator[Problem]:
    """What keeps a class from being an operator, for the author of a plugin."""
    if not isinstance(kind, type):
        where = ".".join(str(getattr(kind, key, "?")) for key in ("__module__", "__qualname__"))
        yield Problem(where, "is not a class", f"Write @register_operator({name!r}) above a class")
        return
    where = origin_of(kind)
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
        message = f"needs a name of lower-case letters, digits and _, has {name!r}"
        yield Problem(where, message, 'Write @register_operator("my_operator") above the class')
    elif name in _OPERATORS and not same_origin(type(_OPERATORS[name]), kind):
        other = origin_of(type(_OPERATORS[name]))
        yield Problem(where, f"{other} is called {name!r} already", "Give one of the two another name")
    grows, options = _given(kind, "grows", None), _given(kind, "options", frozenset())
    if not (isinstance(grows, Set) and grows <= {"depth", "width"}):
        hint = 'Write grows = frozenset({"depth"}), {"width"}, both or neither'
        yield Problem(where, f"`grows` must say what the operator changes, is {grows!r}", hint)
    if not (isinstance(options, Set) and all(isinstance(option, str) for option in options)):
        hint = 'Write options = frozenset({"my_option"}), or leave it out'
        yield Problem(where, f"`options` must be a set of names, is {options!r}", hint)
    sets_size = _given(kind, "sets_size", False)
    if not isinstance(sets_size, bool):
        yield Problem(where, f"`sets_size` must be True or False, is {sets_size!r}")
    yield from _method_flaws(where, kind)


def _given(kind: type, name: str, default: object) -> object:
    """What a class says about itself; a property says it of an instance."""
    value: object = getattr(kind, name, default)
    if not isinstance(value, property | cached_property):
        return value
    return getattr(kind(), name, default) if _takes(kind, ()) and not inspect.isabstract(kind) else default


def _method_flaws(where: str, kind: type) -> Iterator[Problem]:
    """Methods that are missing, or take other arguments."""
    missing: frozenset[str] = getattr(kind, "__abstractmethods__", frozenset())
    for method, first in (("base", "after"), ("grow", "before")):
        hint = f"Write def {method}(self, {first}, stage)"
        function = getattr(kind, method, None)
        if method in missing or not callable(function):
            yield Problem(where, f"lacks {method}", hint)
            continue
        bound = isinstance(inspect.getattr_static(kind, method), staticmethod | classmethod)
        arguments = (first, "stage") if bound else ("self", first, "stage")
        if not _takes(function, arguments):
            yield Problem(where, f"{method}{inspect.signature(function)} cannot be called with {first} and stage", hint)
    if others := sorted(missing - {"base", "grow"}):
        yield Problem(where, f"lacks {', '.join(others)}", "Write these methods")
    elif not missing and not _takes(kind, ()):
        yield Problem(where, "cannot be made without arguments", "Give those of __init__ default values")


def _takes(function: Callable[..., object], arguments: tuple[str, ...]) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def operators() -> dict[str, Operator]:
    """All operators by name, those of this package included."""
    for module in _OWN:
        importlib.import_module(module)  # registers them
    place = {module: number for number, module in enumerate(_OWN)}
    ordered = sorted(_OPERATORS.items(), key=lambda item: place.get(type(item[1]).__module__, len(_OWN)))
    return dict(ordered)
