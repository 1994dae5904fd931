"""After a growth: is every tensor of the grown model, bit for bit, its source?

The check does not trust the aliased read. It reads the small model once more under its own names, one source layer at a
time, into tensors that are sharded like the grown ones, and compares. That costs one read of the small model and the
memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_growth.growth.reader import layer_of, with_layer
from titan_growth.tools.distributed import fail_together
from titan_growth.tools.errors import GrowthError

Tensors = dict[str, Tensor]


def verify_growth(grown: Tensors, source_of: Sequence[int], read_source: Callable[[Tensors], object]) -> int:
    """Compares every tensor with its source and makes sure that it is finite.

    Args:
        grown: the grown model's tensors of this rank (moments too, when they were copied).
        source_of: source layer of each layer.
        read_source: fills tensors from the small model's checkpoint under its own names.

    Returns:
        The number of tensors that this rank has compared.

    Raises:
        GrowthError: on every rank, when any tensor differs or is not finite.
    """
    groups: dict[int | None, dict[str, list[str]]] = {}
    for name in grown:
        layer = layer_of(name)
        source = None if layer is None else source_of[layer]
        source_name = name if source is None else with_layer(name, source)
        groups.setdefault(source, {}).setdefault(source_name, []).append(name)
    wrong: list[str] = []
    num_compared = 0
    # All ranks walk through the same groups, also where they hold nothing of one: reading is collective.
    for source in [None, *sorted(set(source_of))]:
        names = groups.get(source, {})
        sources = {name: torch.empty_like(grown[copies[0]]) for name, copies in names.items()}
        read_source(sources)
        for name, copies in names.items():
            expected = _local(sources[name])
            if not bool(torch.isfinite(expected).all()):
                wrong.append(f"{name} of the small model is not finite")
            for copy in copies:
                num_compared += 1
                if not torch.equal(_local(grown[copy]), expected):
                    wrong.append(f"{copy} differs from its source {name}")
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    fail_together([f"the grown model is wrong: {wrong[0]}{more}"] if wrong else [], GrowthError)
    return num_compared


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
