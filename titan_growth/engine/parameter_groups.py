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
from titan_growth.models.config import DecoderConfig
from titan_growth.models.parametrization import branch_scale, output_scale
from titan_growth.models.roles import Role, axis_lengths, layer_of, role_of
from titan_growth.optimizers.base import width_factor


class Treatment(NamedTuple):
    """How the optimizer treats a parameter."""

    lr_factor: float = 1.0
    weight_decay_factor: float = 1.0
    frozen: bool = False
    eps_factor: float = 1.0

    def __str__(self) -> str:
        if self.frozen:
            return "frozen"
        eps = f", eps x {self.eps_factor:g}" if self.eps_factor != 1.0 else ""
        return f"lr x {self.lr_factor:g}, weight decay x {self.weight_decay_factor:g}{eps}"

    def times(self, other: Treatment) -> Treatment:
        """Both factors of each kind; what is frozen stays so."""
        return Treatment(
            self.lr_factor * other.lr_factor,
            self.weight_decay_factor * other.weight_decay_factor,
            self.frozen or other.frozen,
            self.eps_factor * other.eps_factor,
        )


FROZEN = Treatment(0.0, 0.0, frozen=True)


class SizedModel(NamedTuple):
    """The model whose parameters are optimized: under muP and CompleteP its size has a say in how."""

    config: DecoderConfig
    roles: Mapping[str, Role]
    """Of the family's parameters."""

    def treatment_of(self, section: OptimizerConfig, name: str) -> Treatment:
        """What the parametrisation says about a parameter (models/parametrization.py); nothing under "standard".

        Weight decay is decoupled from the gradient: its factor keeps learning rate x weight decay.
        """
        if self.config.mup is None:
            return Treatment()
        role, eps = role_of(self.roles, name), output_scale(self.config)
        if layer_of(name) is None:
            return Treatment(eps_factor=eps)
        eps *= branch_scale(self.config)
        if role.reads is None:
            return Treatment(eps_factor=eps)
        shape, base_shape = (
            tuple(axis_lengths(sizes)[axis] for axis in role.dims) for sizes in (self.config, self.config.mup)
        )
        lr = width_factor(section, name, shape, base_shape, role.reads)
        return Treatment(lr, 1.0 / lr, eps_factor=eps)


def group_of(section: OptimizerConfig, name: str) -> ParameterGroupConfig | None:
    """The first group whose pattern matches the name."""
    return next((group for group in section.groups if fnmatchcase(name, group.pattern)), None)


def treatment_of(section: OptimizerConfig, name: str, num_dims: int, model: SizedModel | None = None) -> Treatment:
    """How a parameter is treated: by the recipe's groups, times what its parametrisation says.

    Args:
        name: of the parameter; a tied copy goes by the name of its original.
        model: that it belongs to; None for one of the standard parametrisation.
    """
    by_recipe = _by_recipe(section, name, num_dims)
    return by_recipe if model is None else by_recipe.times(model.treatment_of(section, name))


def _by_recipe(section: OptimizerConfig, name: str, num_dims: int) -> Treatment:
    decays = section.weight_decay_on == "all" or (num_dims > 1 and name != f"{EMBEDDING}.weight")
    group = group_of(section, name)
    if group is None:
        return Treatment(1.0, float(decays))
    if group.frozen:
        return FROZEN
    decay = float(decays) if group.weight_decay_factor is None else group.weight_decay_factor
    return Treatment(group.lr_factor, decay)


def treatments(
    section: OptimizerConfig, parameters: Iterable[Parameter], model: SizedModel
) -> Mapping[Treatment, list[Parameter]]:
    """The parameters by how they are treated, each list in the order given."""
    found: dict[Treatment, list[Parameter]] = {}
    for parameter in parameters:
        how = treatment_of(section, parameter.name, len(parameter.shape), model)
        found.setdefault(how, []).append(parameter)
    return found


def unmatched(section: OptimizerConfig, names: Iterable[str]) -> Iterator[int]:
    """Numbers of the groups that no parameter belongs to."""
    used = {id(group_of(section, name)) for name in names}
    for number, group in enumerate(section.groups):
        if id(group) not in used:
            yield number
