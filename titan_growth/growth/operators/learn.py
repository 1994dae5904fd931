"""The operator `learn`: G_learn over depth and width, whose maps are learned (growth/ligo.py does the learning)."""

from __future__ import annotations

from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.axes import NEW, appended, axis_maps
from titan_growth.growth.operators.base import GrowthMap, register_operator
from titan_growth.growth.operators.depth import shallower
from titan_growth.growth.operators.width import widened
from titan_growth.models.config import DecoderConfig

DEFAULT_OPTIONS = {"steps": 100, "lr": 1e-3}


@register_operator("learn")
class Learn:
    """LiGO: W'_l = B_out (sum_j D_lj W_j) B_in^T with B and D learned for `options.steps` steps at `options.lr`.

    `factor` is of the depth; widths are given as sizes. Not function preserving: over depth it starts as G_stack.
    """

    grows = frozenset({"depth", "width"})
    options = frozenset(DEFAULT_OPTIONS)

    def base(self, after: DecoderConfig, planned: PlannedGrowth) -> DecoderConfig | str:
        if planned.factor is None:
            return "needs the sizes to start from in [growth.base], because the stage gives no factor"
        return shallower(after, planned.factor)

    def grow(self, before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap | str:
        if not before.num_layers:
            return "combines layers, and the model has none by then. Use random_depth with n_layers, or map"
        num_layers = planned.n_layers or before.num_layers * (planned.factor or 1)
        layers = planned.layer_map or [layer % before.num_layers for layer in range(num_layers)]
        if NEW in layers:
            return "layer_map has -1, a new layer, which only the operator map makes"
        if beyond := [layer for layer in layers if layer >= before.num_layers]:
            return f"layer_map names layer {beyond[0]}, but the model has only {before.num_layers} layers by then"
        if len(layers) < before.num_layers:
            return f"{len(layers)} layers are fewer than the {before.num_layers} there are"
        after = widened(before, planned, 1, len(layers))
        if isinstance(after, str):
            return after
        if problem := _options_problem(planned):
            return problem
        axes = axis_maps(before, after, appended)
        return GrowthMap(before=before, after=after, layers=tuple(layers), axes=axes, learned=True)


def _options_problem(planned: PlannedGrowth) -> str | None:
    steps, lr = (planned.options.get(name, default) for name, default in DEFAULT_OPTIONS.items())
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        return f"options.steps must be a whole number of at least 1, got {steps!r}"
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < float("inf"):
        return f"options.lr must be a positive number, got {lr!r}"
    if planned.optimizer_state != "reset":
        state = planned.optimizer_state
        return f"optimizer_state = '{state}': moments cannot be carried through maps that are learned"
    if planned.rescale_to_depth:
        return "rescale_to_depth has no meaning: nothing is a copy"
    return "noise has no meaning: nothing is a copy" if planned.noise else None
