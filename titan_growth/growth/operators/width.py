"""Operators that widen a model: dim, heads, key/value heads and SwiGLU together, or some of them. Depth stays.

d channels before, D after; "Du et al." is Du et al., NeurIPS 2024, App. A; heads are copied whole (growth/axes.py).

    split_width   x' = [x, x]         G_direct over width: channels are copied, readers of a copied channel halve it
    zero_width    x' = [x, 0]         G_zero: new channels of the residual stream are silent
    random_width  x' = [x, noise * c] G_random: new channels are random, under a mask c that opens

RMSNorm sees the mean over all channels. Copies do not change it when every channel has equally many; silent channels
lower it, which weights times sqrt(d / D) (Eq. 33) and eps times d / D undo. The official code leaves both out and is
wrong by tens of percent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from titan_growth.config.schema.growth import WIDTHS, PlannedGrowth
from titan_growth.growth.axes import appended, axis_maps, repeated, width_problem
from titan_growth.growth.operators.base import ROUNDING, GrowthMap, register_operator
from titan_growth.models.config import DecoderConfig


def widened(before: DecoderConfig, planned: PlannedGrowth, factor: int, num_layers: int) -> DecoderConfig | str:
    """The model with the planned widths, or else `factor` times as wide; or why it cannot be."""
    sizes: dict[str, Any] = {
        field: getattr(planned, key) or getattr(before, field) * factor for key, field in WIDTHS.items()
    }
    after = replace(before, num_layers=num_layers, **sizes)
    if problem := width_problem(before, after):
        return problem
    return "changes nothing: give a factor, or the sizes after this growth" if after == before else after


class WidthOperator(ABC):
    """What they share: how wide the model becomes."""

    grows = frozenset({"width"})

    def base(self, after: DecoderConfig, planned: PlannedGrowth) -> DecoderConfig | str:
        if planned.factor is None:
            return "needs the sizes to start from in [growth.base], because the stage gives no factor"
        sizes = {field: getattr(after, field) for field in WIDTHS.values()}
        if odd := [key for key, field in WIDTHS.items() if sizes[field] % planned.factor]:
            return f"the factor {planned.factor} does not divide {odd[0]} = {sizes[WIDTHS[odd[0]]]}"
        return replace(after, **{field: size // planned.factor for field, size in sizes.items()})

    def grow(self, before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap | str:
        after = widened(before, planned, planned.factor or 1, before.num_layers)
        return after if isinstance(after, str) else self.map_of(before, after)

    @abstractmethod
    def map_of(self, before: DecoderConfig, after: DecoderConfig) -> GrowthMap:
        """The map between two models."""


@register_operator("split_width")
class SplitWidth(WidthOperator):
    """G_direct over width (Eq. 4-9): rows and embedding columns are copied; a reader of n copies takes 1 / n of each.

    Preserves the function when every channel of the residual stream has equally many copies (D a multiple of d);
    otherwise RMSNorm changes, as the paper says. Copies get the same gradients and, under Adam, stay copies; some
    `noise` or `optimizer_state = "asymmetric"` makes them diverge.
    """

    def map_of(self, before: DecoderConfig, after: DecoderConfig) -> GrowthMap:
        axes = axis_maps(before, after, repeated)
        uniform = "dim" not in axes or axes["dim"].is_uniform
        return GrowthMap(
            before=before,
            after=after,
            layers=tuple(range(before.num_layers)),
            axes=axes,
            tolerance=ROUNDING if uniform else None,
        )


@register_operator("zero_width")
class ZeroWidth(WidthOperator):
    """G_zero over width (Eq. 14): W' = [[W, A], [0, 0]] for what writes to the residual stream, so it stays [x, 0].

    The paper's W' = [[W, A], [0, C]] for every product leaves new SwiGLU channels without gradient at first, and for
    ever if dim does not grow. Here new heads and SwiGLU channels start random and are read with weight 0: they are as
    silent, and learn from the first step.
    """

    def map_of(self, before: DecoderConfig, after: DecoderConfig) -> GrowthMap:
        return _with_new_channels(before, after, new_channels="zero")


@register_operator("random_width")
class RandomWidth(WidthOperator):
    """G_random over width (Eq. 33): everything new starts random; outputs are multiplied by c = [1 .. 1, c .. c].

    c goes from 0 to 1 over `mask_steps` steps. At c = 0 the grown model computes the same up to rounding.
    """

    def map_of(self, before: DecoderConfig, after: DecoderConfig) -> GrowthMap:
        return replace(_with_new_channels(before, after, new_channels="random"), masked=True)


def _with_new_channels(before: DecoderConfig, after: DecoderConfig, *, new_channels: Any) -> GrowthMap:
    widens_residual = after.dim != before.dim
    if widens_residual:
        heads_eps = before.norm_eps if before.qk_norm and before.qk_norm_eps is None else before.qk_norm_eps
        after = replace(after, norm_eps=before.norm_eps * before.dim / after.dim, qk_norm_eps=heads_eps)
    return GrowthMap(
        before=before,
        after=after,
        layers=tuple(range(before.num_layers)),
        axes=axis_maps(before, after, appended),
        new_channels=new_channels,
        rescale_norms=widens_residual,
        tolerance=ROUNDING,
    )
