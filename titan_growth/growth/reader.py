"""Growth as a way of reading: which names a stored tensor is served under.

With `source_of[i]` the source layer of target layer i, the stored `layers.2.ffn_norm.weight` of a model of 3 layers
stacked 4 times is served as `layers.2...`, `layers.5...`, `layers.8...` and `layers.11...`; so are its moments. All
other tensors keep their names. DCP plans from these names, so the read reshards in the same pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from titan_growth.checkpoint.reader import NamesOf

_LAYER = re.compile(r"(?<![^.])layers\.(\d+)\.")


def grown_names(source_of: Sequence[int]) -> NamesOf:
    """The `names_of` that shows a small model as the grown one."""
    targets: dict[int, list[int]] = {}
    for target, source in enumerate(source_of):
        targets.setdefault(source, []).append(target)

    def names_of(name: str) -> list[str]:
        match = _LAYER.search(name)
        if match is None:
            return [name]
        return [with_layer(name, target) for target in targets.get(int(match[1]), [])]

    return names_of


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its name."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def with_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    return _LAYER.sub(f"layers.{layer}.", name, count=1)
