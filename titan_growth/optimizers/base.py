"""What an optimizer is here: which rule updates each parameter, and what the rule keeps of it.

The recipe names an optimizer. It gives every parameter an *update rule*, by name and number of dimensions: AdamW has
one rule for all, Muon has two. A rule makes a `torch.optim.Optimizer`, and says as data which state that keeps. All
that growth, checkpoints and resharding know of an optimizer is this data. Ours are in `adam.py` and `muon.py`; a plugin
adds one with `@register_optimizer` (docs/extending/adding_an_optimizer.md).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from titan_growth.config.fields import no_option, suggestion
from titan_growth.config.plugins import origin_of, same_origin
from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.findings import Findings

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class StateTensor:
    """One thing that a rule keeps of each parameter; it starts as zeros."""

    name: str
    """Its key in the state of the `torch.optim.Optimizer`, and in checkpoints."""
    power: int | None
    """Of a mean of gradients: the power of the gradient, and it has the shape of the parameter. None of a counter of
    steps, which is one float32 number."""


@dataclass(frozen=True)
class Site:
    """Where an optimizer works."""

    device: torch.device
    """Where the model computes; with host offload the parameters are elsewhere."""
    group: ProcessGroup | None = None
    """The ranks that hold shards of the same parameters; None for this one alone, and where no rule of the optimizer
    asks for it."""


class UpdateRule(Protocol):
    """One way to update parameters."""

    @property
    def name(self) -> str:
        """For the plan."""
        ...

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """What it keeps of each parameter."""
        ...

    def make(self, groups: list[dict[str, Any]], section: OptimizerConfig, site: Site) -> torch.optim.Optimizer:
        """The optimizer of some parameters, in PyTorch's parameter groups; the learning rate is set before each step.

        A step must be linear in the learning rate, weight decay included. Its `state` is filled in afterwards.
        """
        ...

    # Two more that may be left out:
    # width_factor(shape, base_shape, reads, section) -> float, the factor on the learning rate of a hidden matrix under
    # muP. Without it, the update is taken to be like Adam's: of elements whose size does not depend on the width.
    # needs_group: bool, whether `make` reads `site.group`. Without it, it may.


class OptimizerKind(Protocol):
    """What `optimizer.name` names."""

    @property
    def rules(self) -> Sequence[UpdateRule]:
        """All rules that it uses."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Names that `[optimizer.options]` may have, and their defaults."""
        ...

    def rule_of(self, name: str, num_dims: int) -> UpdateRule:
        """The rule of a parameter: one of `rules`."""
        ...

    def problem(self, options: Mapping[str, Any]) -> str | None:
        """What is wrong with the options, all of which are there and have the types of the defaults."""
        ...


_OPTIMIZERS: dict[str, OptimizerKind] = {}
_OWN = tuple(f"titan_growth.optimizers.{module}" for module in ("adam", "muon"))
"""The modules of the optimizers of this package."""

Kind = TypeVar("Kind", bound=type)


def register_optimizer(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: registers an optimizer under a name. The class is instantiated without arguments.

    A module that is imported again replaces its own optimizer, and no other.

    Raises:
        ConfigError: with everything that is wrong with the class, which is then not registered.
    """

    def register(kind: Kind) -> Kind:
        if kind.__module__ not in _OWN:
            optimizers()  # so that the names of this package are taken
        if problems := list(_flaws(name, kind)):
            raise ConfigError(problems)
        _OPTIMIZERS[name] = kind()
        return kind

    return register


def _flaws(name: str, kind: Any) -> Iterator[Problem]:
    """What keeps a class from being an optimizer, for the author of a plugin."""
    where = origin_of(kind)
    if not (isinstance(name, str) and re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name)):
        yield Problem(where, f"needs a name of letters, digits and _, has {name!r}")
    elif name in _OPTIMIZERS and not same_origin(type(_OPTIMIZERS[name]), kind):
        yield Problem(where, f"{origin_of(type(_OPTIMIZERS[name]))} is called {name!r} already", "Choose another name")
    missing = [each for each in ("rules", "options", "rule_of", "problem") if not hasattr(kind, each)]
    if missing:
        yield Problem(where, f"lacks {', '.join(missing)}", "docs/extending/adding_an_optimizer.md has the contract")
        return
    for state in (state for rule in kind.rules for state in rule.state):
        if "." in state.name:
            yield Problem(where, f"keeps {state.name!r}", "A name of state has no dots")
        elif (known := _states().get(state.name, state)) != state:
            message = f"keeps {state.name} of power {state.power}, which elsewhere is of power {known.power}"
            yield Problem(where, message, "Give it another name")


def optimizers() -> dict[str, OptimizerKind]:
    """All optimizers by name, those of this package first."""
    for module in _OWN:
        importlib.import_module(module)  # registers them
    return dict(sorted(_OPTIMIZERS.items(), key=lambda item: type(item[1]).__module__ not in _OWN))


def _states() -> dict[str, StateTensor]:
    return {state.name: state for kind in _OPTIMIZERS.values() for rule in kind.rules for state in rule.state}


def state_named(key: str) -> StateTensor:
    """What is kept under a key, by whichever optimizer. Two of different meaning cannot have the same key."""
    optimizers()
    states = _states()
    assert key in states, f"no optimizer keeps {key}"
    return states[key]


def optimizer_named(name: str) -> OptimizerKind:
    """The optimizer of a recipe. Raises ConfigError when there is none of that name."""
    known = optimizers()
    if name not in known:
        message = f"unknown optimizer '{name}'; known: {', '.join(known)}"
        raise ConfigError([Problem("optimizer.name", message, suggestion(name, known))])
    return known[name]


def state_of(section: OptimizerConfig, name: str, num_dims: int) -> Sequence[StateTensor]:
    """What a recipe's optimizer keeps of a parameter. Raises ConfigError when there is no such optimizer."""
    return optimizer_named(section.name).rule_of(name, num_dims).state


def needs_group(section: OptimizerConfig) -> bool:
    """Whether a recipe's optimizer works across ranks. It is asked of all its rules, those included that no parameter
    of this rank has: a group is made by all ranks together."""
    return any(getattr(rule, "needs_group", True) for rule in optimizer_named(section.name).rules)


def options_of(section: OptimizerConfig) -> dict[str, Any]:
    """The options of a recipe's optimizer, all of them."""
    return {**optimizer_named(section.name).options, **section.options}


def check_optimizer(section: OptimizerConfig, found: Findings) -> None:
    """Reports an optimizer that does not exist, and options that it does not have."""
    try:
        kind = optimizer_named(section.name)
    except ConfigError as error:
        found.problems += error.problems
        return
    own = Findings()
    for option, value in section.options.items():
        key = f"optimizer.options.{option}"
        if option not in kind.options:
            own.problems.append(no_option(key, section.name, option, list(kind.options)))
            continue
        default = kind.options[option]
        if not (type(value) is type(default) or (type(default) is float and type(value) is int)):
            own.problem(key, f"must be like its default, {default!r}, got {value!r}")
    if not own.problems and (problem := kind.problem(options_of(section))):
        own.problem("optimizer.options", problem)
    found.extend(own)


def width_factor(
    section: OptimizerConfig, name: str, shape: Sequence[int], base_shape: Sequence[int], reads: int
) -> float:
    """Factor on the learning rate of a hidden matrix under muP: as its rule says, or Adam's.

    Args:
        base_shape: of the matrix at the base size.
        reads: the dimension that a product sums over.
    """
    rule = optimizer_named(section.name).rule_of(name, len(shape))
    own: Callable[..., float] = getattr(rule, "width_factor", elementwise_width_factor)
    return own(shape, base_shape, reads, section)


def elementwise_width_factor(
    shape: Sequence[int], base_shape: Sequence[int], reads: int, section: OptimizerConfig
) -> float:
    """1 / n. Elements of Adam's update are about as large at every width, and a product sums n of them, which the
    gradient has aligned with the input (Yang et al., 2022)."""
    return base_shape[reads] / shape[reads]
