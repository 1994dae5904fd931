"""What a growth does to weights because the factors of muP and CompleteP change with the size.

    logits      x 1 / N   the head takes the ratio, or the final norm where the head is the embedding too
    branches    x 1 / L   writing projections take the ratio, divided by the number of layers that come from theirs

A grown model then computes what the small one did wherever the operator preserves the function. And where it does not,
as much is added as before: n copies of a layer of which each now adds 1 / n need no factor, which is what G_stack is
under CompleteP. The rest follows from it: parameter x s under a factor of 1 / s has a gradient of 1 / s.
"""

from __future__ import annotations

from collections import Counter

from titan_growth.growth.operators.base import GrowthMap
from titan_growth.models.parametrization import branch_scale, output_reader, output_scale
from titan_growth.models.roles import Role, layer_of


def carried(growth: GrowthMap, role: Role, parameter: str) -> float:
    """Factor on a parameter of the grown model that comes from one of the small model.

    Args:
        parameter: its name in the grown model.
    """
    before, after = growth.before, growth.after
    if parameter == output_reader(after):
        return output_scale(before) / output_scale(after)
    layer = layer_of(parameter)
    if layer is None or not role.writes_residual or branch_scale(before) == branch_scale(after):
        return 1.0
    adding = 1 if growth.silent_copies else Counter(growth.layers)[growth.layers[layer]]
    return branch_scale(before) / branch_scale(after) / adding


def is_exact(growth: GrowthMap) -> bool:
    """Whether the factors only change exponents, so that nothing is rounded."""
    changes = (scale(growth.before) / scale(growth.after) for scale in (output_scale, branch_scale))
    return all(change.hex().startswith("0x1.0000000000000p") for change in changes)
