"""Which parameters the optimizer treats alike: `[[optimizer.groups]]` and `optimizer.weight_decay_on`.

Everything is decided by a parameter's name and number of dimensions, so a group means the same on every mesh, and after
a growth the new layers are in the groups that their names match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from titan_growth.config.schema.optimizer import OptimizerConfig, ParameterGroupConfig
from titan_growth.layout.shards import EMBEDDING, Parameter


class Treatment(NamedTuple):
    """How the optimizer treats a parameter."""

    lr_factor: float = 1.0
    weight_decay_factor: float = 1.0
    frozen: bool = False

    def __str__(self) -> str:
        if self.frozen:
            return "frozen"
        return f"lr x {self.lr_factor:g}, weight decay x {self.weight_decay_factor:g}"


FROZEN = Treatment(0.0, 0.0, frozen=True)


def group_of(section: OptimizerConfig, name: str) -> ParameterGroupConfig | None:
    """The first group whose pattern matches the name."""
    return next((group for group in section.groups if fnmatchcase(name, group.pattern)), None)


def treatment_of(section: OptimizerConfig, name: str, num_dims: int) -> Treatment:
    """What the recipe says about a parameter; a tied copy goes by the name of its original."""
    decays = section.weight_decay_on == "all" or (num_dims > 1 and name != f"{EMBEDDING}.weight")
    group = group_of(section, name)
    if group is None:
        return Treatment(1.0, float(decays))
    if group.frozen:
        return FROZEN
    decay = float(decays) if group.weight_decay_factor is None else group.weight_decay_factor
    return Treatment(group.lr_factor, decay)


def treatments(section: OptimizerConfig, parameters: Iterable[Parameter]) -> Mapping[Treatment, list[Parameter]]:
    """The parameters by how they are treated, each list in the order given."""
    found: dict[Treatment, list[Parameter]] = {}
    for parameter in parameters:
        found.setdefault(treatment_of(section, parameter.name, len(parameter.shape)), []).append(parameter)
    return found


def unmatched(section: OptimizerConfig, names: Iterable[str]) -> Iterator[int]:
    """Numbers of the groups that no parameter belongs to."""
    used = {id(group_of(section, name)) for name in names}
    for number, group in enumerate(section.groups):
        if id(group) not in used:
            yield number
