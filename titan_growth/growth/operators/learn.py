"""The operator `learn`: G_learn over depth and width, whose maps are learned (growth/ligo.py does the learning)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from titan_growth.config.schema.growth import WIDTHS, PlannedGrowth
from titan_growth.growth.axes import appended, axis_maps, width_problem
from titan_growth.growth.operators.base import GrowthMap, register_operator
from titan_growth.growth.operators.depth import shallower
from titan_growth.models.config import DecoderConfig

DEFAULT_STEPS, DEFAULT_LR = 100, 1e-3


@register_operator("learn")
class Learn:
    """LiGO: W'_l = B_out (sum_j D_lj W_j) B_in^T with B and D learned for `options.steps` steps at `options.lr`.

    `factor` is of the depth; widths are given as sizes. Not function preserving: over depth it starts as G_stack.
    """

    grows = frozenset({"depth", "width"})
    options = frozenset({"steps", "lr"})

    def base(self, after: DecoderConfig, stage: PlannedGrowth) -> DecoderConfig | str:
        if stage.factor is None:
            return "needs the sizes to start from in [growth.base], because the stage gives no factor"
        return shallower(after, stage.factor)

    def grow(self, before: DecoderConfig, stage: PlannedGrowth) -> GrowthMap | str:
        if stage.layer_map is not None:
            layers = stage.layer_map
        else:
            num_layers = stage.n_layers or before.num_layers * (stage.factor or 1)
            layers = [layer % before.num_layers for layer in range(num_layers)]
        if beyond := [layer for layer in layers if layer >= before.num_layers]:
            return f"layer_map names layer {beyond[0]}, but the model has only {before.num_layers} layers by then"
        if len(layers) < before.num_layers:
            return f"{len(layers)} layers are fewer than the {before.num_layers} there are"
        sizes: dict[str, Any] = {field: getattr(stage, key) or getattr(before, field) for key, field in WIDTHS.items()}
        after = replace(before, num_layers=len(layers), **sizes)
        if problem := width_problem(before, after):
            return problem
        if after == before:
            return "changes nothing: give a factor, or the sizes after this growth"
        if problem := self._odd_options(stage):
            return problem
        axes = axis_maps(before, after, appended)
        return GrowthMap(before=before, after=after, layers=tuple(layers), axes=axes, learned=True)

    def _odd_options(self, stage: PlannedGrowth) -> str | None:
        steps, lr = learning_options(stage)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            return f"options.steps must be a whole number of at least 1, got {steps!r}"
        if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < float("inf"):
            return f"options.lr must be a positive number, got {lr!r}"
        if stage.optimizer_state != "reset":
            return (
                f"optimizer_state = '{stage.optimizer_state}': moments cannot be carried through maps that are learned"
            )
        if stage.noise:
            return "noise has no meaning: nothing is a copy"
        return None


def learning_options(stage: PlannedGrowth) -> tuple[Any, Any]:
    """(steps, learning rate) of a stage's learning phase."""
    return stage.options.get("steps", DEFAULT_STEPS), stage.options.get("lr", DEFAULT_LR)
