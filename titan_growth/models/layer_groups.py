"""Names for the pieces of a model that are reported apart: groups within each layer, and what lies around the layers.

in every layer    attention, feed_forward, norms (by the family's roles), and layer: all of it
around them       embedding, norm (the last one), head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_growth.models import decoder
from titan_growth.models.roles import Role, bare_name, layer_of

WHOLE = "layer"
"""The group of a whole layer."""

NORMS = "norms"
"""The group of a layer's norms, also of those within its attention."""

_AROUND = {"tok_embeddings": "embedding", "norm": "norm", "output": "head"}

ByGroup = dict[str, "list[float] | float"]
"""Group -> a number for each layer, or one number for what lies around the layers."""


def group_of_child(roles: Mapping[str, Role], child: str) -> str:
    """The group of a child of a block."""
    role = roles.get(f"{child}.weight")
    return NORMS if role is not None and role.is_norm else child


@dataclass(frozen=True)
class LayerGroups:
    """The pieces of a model, each with a slot: those of a layer lie together, so that a vector can hold all."""

    in_layer: tuple[str, ...]
    """The last one is `WHOLE`."""
    around: tuple[str, ...]
    num_layers: int

    @classmethod
    def of(cls, roles: Mapping[str, Role], num_layers: int) -> LayerGroups:
        """The groups of a family, by the roles of its parameters."""
        in_layer = dict.fromkeys(_group(roles, name) for name in roles if name not in decoder.ROLES)
        products = tuple(group for group in in_layer if group != NORMS)
        return cls((*products, NORMS, WHOLE), tuple(_AROUND.values()), num_layers)

    @property
    def num_slots(self) -> int:
        """Pieces of the whole model."""
        return self.num_layers * len(self.in_layer) + len(self.around)

    def slots_of(self, layer: int) -> slice:
        """The slots of a layer, in the order of `in_layer`."""
        return slice(layer * len(self.in_layer), (layer + 1) * len(self.in_layer))

    def slot_of(self, roles: Mapping[str, Role], name: str) -> int:
        """The slot of a parameter's group."""
        group, layer = _group(roles, bare_name(name)), layer_of(name)
        if layer is None:
            return self.slot_around(group)
        return self.slots_of(layer).start + self.in_layer.index(group)

    def slot_around(self, group: str) -> int:
        """The slot of a group outside the layers."""
        return self.num_layers * len(self.in_layer) + self.around.index(group)

    def by_group(self, values: Sequence[float]) -> ByGroup:
        """The values of all slots, by group."""
        table: ByGroup = {}
        for position, group in enumerate(self.in_layer):
            table[group] = list(values[position : self.num_layers * len(self.in_layer) : len(self.in_layer)])
        return table | {group: values[self.slot_around(group)] for group in self.around}


def _group(roles: Mapping[str, Role], bare: str) -> str:
    child = bare.partition(".")[0]
    if bare in decoder.ROLES:
        return _AROUND[child]
    return NORMS if roles[bare].is_norm else child
