"""From a growth map to the rule for a single tensor: which stored elements it is made of, and what happens to them.

    grown[i, j] = scale * row_scale[i] * column_scale[j] * stored[rows[i], columns[j]]     where both have a source
                  0 or an initial value                                                    elsewhere
                  + noise                                                                  where it is a copy

Weights, first and second moments and step counters of a parameter have rules of their own, made of the same map. Rules
are pure data; `read_grown` evaluates one on a box of the tensor, so that every rank makes exactly its shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.axes import NEW, AxisMap
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.models.roles import OPTIMIZER_PREFIX, RESIDUAL, Role, layer_of, role_of, with_layer

MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
"""State of a parameter -> the power of the gradient that it is a mean of."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one tensor of the grown model is made."""

    parameter: str
    """The parameter that it belongs to, in the grown model."""
    source: str | None
    """The stored tensor it comes from; None for one that has no source at all."""
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
    fresh: bool
    """The whole tensor is a copy, or new."""


class Rules:
    """The rules of one growth.

    Args:
        growth_map: what comes from where.
        planned: how the recipe wants it carried out.
        roles: the family's table of parameters.
        tied: parameters that are copies of another one, by its name; a reader of a copied channel is then the norm
            before the head, since a head that is the embedding too cannot be halved.
    """

    def __init__(
        self, growth_map: GrowthMap, planned: PlannedGrowth, roles: Mapping[str, Role], tied: Mapping[str, str]
    ) -> None:
        self.growth_map = growth_map
        self.planned = planned
        self.roles = roles
        self.tied = tied

    def of(self, name: str) -> Rule:
        """The rule of a tensor of the grown model, a parameter or a part of the optimizer's state."""
        if not name.startswith(OPTIMIZER_PREFIX):
            return self._weight(name)
        parameter, key = name.removeprefix(OPTIMIZER_PREFIX).rsplit(".", 1)
        return self._step(parameter) if key == "step" else self._moment(parameter, key)

    def reads_state(self) -> bool:
        """Whether anything of the optimizer's state is kept."""
        return self.planned.optimizer_state != "reset"

    # ---- weights -------------------------------------------------------------------------------------------------

    def _weight(self, parameter: str) -> Rule:
        role = self._role(parameter)
        source, copied = self._source(parameter)
        # A tied parameter is stored under both names; what is new in it must be new in the same way.
        same = self.tied.get(parameter, parameter)
        common: dict[str, Any] = {"parameter": same, "noise": self.planned.noise, "copied_layer": copied}
        if source is None:
            return Rule(source=None, initial=True, **common)
        if copied and self.growth_map.silent_copies and role.writes_residual:
            return Rule(source=None, **{**common, "noise": 0.0})
        axes = self.growth_map.axes_of(role)
        return Rule(
            source=source,
            indices=_indices(axes),
            scales=self._reading_scales(parameter, role, axes),
            scale=self.growth_map.norm_scale if role.dims == (RESIDUAL,) else 1.0,
            initial=self._starts_random(role),
            originals=_originals(axes),
            **common,
        )

    def _source(self, parameter: str) -> _Source:
        layer = layer_of(parameter)
        if layer is None:
            return _Source(parameter, False)
        source = self.growth_map.layers[layer]
        original = self.growth_map.is_original_layer[layer]
        return _Source(None if source is None else with_layer(parameter, source), not original)

    def _reading_scales(
        self, parameter: str, role: Role, axes: Sequence[AxisMap | None]
    ) -> tuple[tuple[float, ...] | None, ...]:
        """A product over a copied axis takes from each copy its share."""
        reads = self._reads(parameter, role)
        return tuple(
            axis.shares if axis is not None and dim == reads and set(axis.shares) != {1.0} else None
            for dim, axis in enumerate(axes)
        )

    def _role(self, parameter: str) -> Role:
        return role_of(self.roles, self.tied.get(parameter, parameter))

    def _reads(self, parameter: str, role: Role) -> int | None:
        """The dimension that takes shares. The final norm stands in for a head that is the embedding as well."""
        return 0 if self.tied and parameter == "norm.weight" else role.reads

    def _starts_random(self, role: Role) -> bool:
        """Whether elements without a source start from the initial distribution."""
        if self.growth_map.new_channels == "random" or role.is_norm:
            return True
        # Silent: nothing new may reach the residual stream, from the embedding or from a projection that writes to it.
        return role.reads is not None and not role.writes_residual

    # ---- state of the optimizer ----------------------------------------------------------------------------------

    def _moment(self, parameter: str, key: str) -> Rule:
        """Moments follow the weights' indices; `asymmetric` zeroes what is not original.

        An old step counter says that the moments are old, and a second moment of zero is then taken for a tiny one: the
        first updates are up to 6.6 times the learning rate at beta2 = 0.999. So where a tensor keeps its counter, new
        second moments are seeded with those of the elements that they were copied from, or would have been.
        """
        policy, role = self.planned.optimizer_state, self._role(parameter)
        source, copied = self._source(parameter)
        nothing = Rule(parameter=parameter, source=None)
        if policy == "reset" or source is None or (copied and policy == "asymmetric"):
            return nothing
        if copied and self.growth_map.silent_copies and role.writes_residual:
            return nothing
        axes = self.growth_map.axes_of(role)
        power = MOMENTS[key]
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
        return Rule(
            parameter=parameter,
            source=f"{OPTIMIZER_PREFIX}{source}.{key}",
            indices=indices,
            scales=self._gradient_scales(parameter, role, axes, power) if scaled else (),
            scale=self.growth_map.norm_scale**-power if scaled and role.dims == (RESIDUAL,) else 1.0,
        )

    def _gradient_scales(
        self, parameter: str, role: Role, axes: Sequence[AxisMap | None], power: int
    ) -> tuple[tuple[float, ...] | None, ...]:
        """How the gradient of a copy compares with that of its source, to a power.

        What n readers share, each passes back a share: the gradient of a copied row is 1 / n of its source's. A copied
        column sees the same input and the same gradient of its output as before.
        """
        reads = self._reads(parameter, role)
        return tuple(
            tuple(share**power for share in axis.shares)
            if axis is not None and dim != reads and set(axis.shares) != {1.0}
            else None
            for dim, axis in enumerate(axes)
        )

    def _step(self, parameter: str) -> Rule:
        """One counter for each tensor: kept with moments that are kept, zero with moments that start anew."""
        source, copied = self._source(parameter)
        role = self._role(parameter)
        fresh = source is None or (copied and self.planned.optimizer_state == "asymmetric")
        fresh = fresh or (copied and self.growth_map.silent_copies and role.writes_residual)
        if fresh or not self.planned.keeps_step:
            return Rule(parameter=parameter, source=None)
        return Rule(parameter=parameter, source=f"{OPTIMIZER_PREFIX}{source}.step")


def _indices(axes: Sequence[AxisMap | None]) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if axis is None else axis.source for axis in axes)


def _originals(axes: Sequence[AxisMap | None]) -> tuple[tuple[bool, ...] | None, ...]:
    return tuple(None if axis is None else axis.is_original for axis in axes)
