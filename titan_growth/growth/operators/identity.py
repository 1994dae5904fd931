"""The operator that leaves the model's size alone, for what else a growth may change: the context, the batch, the mesh.

The usual one is context extension: longer sequences, and a larger base of the rotary frequencies under which the angles
of far positions stay within those that the model has seen (Xiong et al. 2023, arXiv 2309.16039). Weights and moments
have no entries for positions, so all are kept as they are. With another base the function changes at once.
"""

from __future__ import annotations

from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.operators.base import GrowthMap, register_operator
from titan_growth.models.config import DecoderConfig


@register_operator("identity")
class Identity:
    """Every layer and channel comes from itself."""

    grows: frozenset[str] = frozenset()

    def base(self, after: DecoderConfig, planned: PlannedGrowth) -> DecoderConfig | str:
        return after

    def grow(self, before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap | str:
        if not planned.changes_layout and planned.rope_theta is None:
            return "changes nothing. Give seq_len, rope_theta, a batch size, parallelism or num_ranks"
        if planned.noise:
            return "copies nothing that noise could be added to. Remove noise"
        if planned.lr_policy == "rewarm_new":
            return 'adds no parameters that lr_policy "rewarm_new" could warm up. Use "rewarm", or "continue"'
        return GrowthMap(before=before, after=before, layers=tuple(range(before.num_layers)), tolerance=0.0)
