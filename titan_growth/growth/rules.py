"""From a growth map to the rule for a single tensor: which stored elements it is made of, and what happens to them.

    grown[i, j] = scale * row_scale[i] * column_scale[j] * stored[rows[i], columns[j]]     where both have a source
                  0 or an initial value                                                    elsewhere
                  + noise                                                                  where it is a copy

Weights, moments and step counters of a parameter have rules of their own, from the same map. Rules are pure data;
`read_grown` evaluates one on a box of the tensor, so every rank makes exactly its shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.axes import NEW
from titan_growth.growth.multipliers import carried
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.models.initial_values import InitialValues
from titan_growth.models.roles import (
    OPTIMIZER_PREFIX,
    RESIDUAL,
    Role,
    layer_of,
    prefix_of_shadow,
    role_of,
    with_layer,
)
from titan_growth.optimizers.base import state_named


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one tensor of the grown model is made."""

    parameter: str
    """The parameter of the grown model that it belongs to."""
    source: str | None
    """The stored tensor it comes from, if any."""
    indices: tuple[tuple[int, ...] | None, ...] = ()
    """For each dimension, the stored position of each position (`NEW` for none); None where nothing changes."""
    scales: tuple[tuple[float, ...] | None, ...] = ()
    """For each dimension, a factor for each position; None where nothing is scaled."""
    scale: float = 1.0
    initial: bool = False
    """Elements without a source start from the parameter's initial distribution; otherwise from zero."""
    noise: float = 0.0
    """Deviation of the noise on copies, as a share of that of the initial distribution."""
    copied_layer: bool = False
    """The whole tensor is a copy; otherwise only what `originals` says."""
    originals: tuple[tuple[bool, ...] | None, ...] = ()
    """For each dimension, whether a position is the first with its source."""


class _Source(NamedTuple):
    """Where a parameter comes from."""

    name: str | None
    """None for a new one."""
    copied: bool
    """The whole tensor is a copy, or new."""


@dataclass(frozen=True)
class Rules:
    """The rules of one growth."""

    growth_map: GrowthMap
    planned: PlannedGrowth
    family: ModuleType
    """The module of the model's family: its parameters' roles and initial distributions."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Parameters that are copies of another one, by its name."""
        return self.growth_map.after.tied

    def of(self, name: str) -> Rule:
        """The rule of a tensor of the grown model: a parameter, a part of the optimizer's state, or a shadow weight.

        A shadow weight grows as its parameter does, from the small one's: both get the same new values and noise.
        """
        if name.startswith(OPTIMIZER_PREFIX):
            return self._state(*name.removeprefix(OPTIMIZER_PREFIX).rsplit(".", 1))
        prefix = prefix_of_shadow(name)
        rule = self._weight(name.removeprefix(prefix))
        return rule if rule.source is None else replace(rule, source=f"{prefix}{rule.source}")

    def initial_values(self, parameter: str) -> InitialValues | None:
        """A parameter's initial distribution in the grown model; None for ones."""
        initial: InitialValues | None = self.family.init_rule(self.growth_map.after, parameter)
        return initial

    def keeps_layer_silent(self, role: Role) -> bool:
        """Whether copies of a parameter are zero, so that their layer adds nothing."""
        return self.growth_map.silent_copies and role.writes_residual

    # ---- weights -------------------------------------------------------------------------------------------------

    def _weight(self, parameter: str) -> Rule:
        role = self._role(parameter)
        source, copied = self._source(parameter)
        # A tied parameter is stored under both names; what is new must be the same in both.
        same = self.tied.get(parameter, parameter)
        common: dict[str, Any] = {"parameter": same, "noise": self.planned.noise, "copied_layer": copied}
        if source is None:
            return Rule(source=None, initial=True, **common)
        if copied and self.keeps_layer_silent(role):
            return Rule(source=None, **{**common, "noise": 0.0})
        axes = self.growth_map.axes_of(role)
        return Rule(
            source=source,
            indices=tuple(None if axis is None else axis.source for axis in axes),
            scales=self._shares(parameter, role, reading=True),
            scale=self._scale(role, copied) * carried(self.growth_map, role, parameter),
            initial=self._starts_random(role),
            originals=tuple(None if axis is None else axis.is_original for axis in axes),
            **common,
        )

    def _scale(self, role: Role, copied: bool) -> float:
        """The factor on a whole weight."""
        if role.dims == (RESIDUAL,):
            return self.growth_map.norm_scale
        return self.growth_map.depth_scale if copied and role.writes_residual and self.planned.rescale_to_depth else 1.0

    def _source(self, parameter: str) -> _Source:
        layer = layer_of(parameter)
        if layer is None:
            return _Source(parameter, False)
        source = self.growth_map.layers[layer]
        original = self.growth_map.is_original_layer[layer]
        return _Source(None if source is None else with_layer(parameter, source), not original)

    def _shares(
        self, parameter: str, role: Role, *, reading: bool, power: int = 1
    ) -> tuple[tuple[float, ...] | None, ...]:
        """The shares of copied positions, to a power: of the dimension that is read, or of the others.

        A product over a copied axis takes from each copy its share. Backwards, what n readers share gets its share of
        the gradient from each: that of a copied row is 1 / n of its source's. A copied column sees the same input and
        the same gradient of its output as before. With a tied head, which cannot be halved because it is the embedding
        too, the final norm counts as the reader.
        """
        reads = 0 if self.tied and parameter == "norm.weight" else role.reads
        return tuple(
            tuple(share**power for share in axis.shares)
            if axis is not None and (dim == reads) == reading and set(axis.shares) != {1.0}
            else None
            for dim, axis in enumerate(self.growth_map.axes_of(role))
        )

    def _role(self, parameter: str) -> Role:
        return role_of(self.family.ROLES, self.tied.get(parameter, parameter))

    def _starts_random(self, role: Role) -> bool:
        """Whether elements without a source start from the initial distribution."""
        if self.growth_map.new_channels == "random" or role.is_norm:
            return True
        # Silent: nothing new may reach the residual stream, from the embedding or from a projection that writes to it.
        return role.reads is not None and not role.writes_residual

    # ---- state of the optimizer ----------------------------------------------------------------------------------

    def _state(self, parameter: str, key: str) -> Rule:
        """Moments follow the weights' indices; `asymmetric` zeroes what is not original. Counters follow the moments.

        An old step counter marks the moments as old, and a second moment of zero then counts as a tiny one: the first
        updates are up to 6.6 times the learning rate at beta2 = 0.999. So where a tensor keeps its counter, new second
        moments are seeded with those of the elements that they were copied from, or would have been.
        """
        policy, role, power = self.planned.optimizer_state, self._role(parameter), state_named(key).power
        source, copied = self._source(parameter)
        starts_over = copied and (policy == "asymmetric" or self.keeps_layer_silent(role))
        if policy == "reset" or source is None or starts_over or (power is None and not self.planned.keeps_step):
            return Rule(parameter=parameter, source=None)
        stored = f"{OPTIMIZER_PREFIX}{source}.{key}"
        if power is None:
            return Rule(parameter=parameter, source=stored)
        axes = self.growth_map.axes_of(role)
        seeded = power == 2 and self.planned.keeps_step
        indices = tuple(None if axis is None else axis.nearest if seeded else axis.source for axis in axes)
        if policy == "asymmetric" and not seeded:
            indices = tuple(
                None
                if axis is None
                else tuple(at if first else NEW for at, first in zip(axis.source, axis.is_original, strict=True))
                for axis in axes
            )
        scaled = policy in ("copy_scaled", "asymmetric")
        factor = carried(self.growth_map, role, parameter)
        factor *= self.growth_map.norm_scale if role.dims == (RESIDUAL,) else 1.0
        return Rule(
            parameter=parameter,
            source=stored,
            indices=indices,
            scales=self._shares(parameter, role, reading=False, power=power) if scaled else (),
            scale=factor**-power if scaled else 1.0,
        )
