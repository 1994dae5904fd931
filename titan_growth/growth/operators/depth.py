"""Operators that add layers. Widths stay; embedding, final norm and head are copied.

l layers before, L after, g = L / l. "Du et al." is Du et al., NeurIPS 2024 (arXiv 2405.15319), whose four atomic
operators are called direct, zero, random and learn there.

    stack         0 1 2 0 1 2   G_direct over depth, alias G_stack: M_target = M o M o ... o M (Alg. 1)
    interpose     0 0 1 1 2 2   each layer followed by its copies ("interposition", better for converged models)
    middle        0 1 1 2       the middle block once more (gradual stacking as in MIDAS)
    map           as you write  any list of source layers; -1 is a new one
    zero_depth    0 0'1 1'2 2'  G_zero: the copies' writing projections are zero, so each adds exactly nothing
    random_depth  0 - 1 - 2 -   G_random: new layers from their initial distribution, under a mask that opens

From a base without layers only `random_depth` and `map` lead on: there is nothing to copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.axes import NEW
from titan_growth.growth.operators.base import GrowthMap, register_operator
from titan_growth.models.config import DecoderConfig


def shallower(after: DecoderConfig, factor: int) -> DecoderConfig | str:
    """The model that `factor` times as many layers have grown from, or why there is none."""
    if after.num_layers % factor:
        return f"the factor {factor} does not divide {after.num_layers} layers"
    return replace(after, num_layers=after.num_layers // factor)


class DepthOperator(ABC):
    """What they share: how deep the model becomes, and which layer comes from which."""

    grows = frozenset({"depth"})
    keeps_order = False
    """Whether every old layer must stay, in the old order, as preserving the function requires."""
    makes_new = False
    """Whether its `layer_map` may name new layers."""
    copies = True
    """Whether it needs layers to copy."""

    def base(self, after: DecoderConfig, planned: PlannedGrowth) -> DecoderConfig | str:
        if planned.factor is None:
            return "needs growth.base.n_layers, because the stage gives no factor"
        return shallower(after, planned.factor)

    def grow(self, before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap | str:
        num_layers = before.num_layers
        if num_layers == 0 and self.copies:
            return "copies layers, and the model has none by then. Use random_depth with n_layers, or map"
        if num_layers == 0 and planned.factor is not None:
            return f"factor = {planned.factor} of 0 layers are 0. Give n_layers instead"
        if planned.layer_map is not None:
            if NEW in planned.layer_map and not self.makes_new:
                return "layer_map has -1, a new layer, which only the operator map makes"
            if beyond := [layer for layer in planned.layer_map if layer >= num_layers]:
                return f"layer_map names layer {beyond[0]}, but the model has only {num_layers} layers by then"
            if len(planned.layer_map) <= num_layers:
                return f"layer_map lists {len(planned.layer_map)} layers, not more than the {num_layers} there are"
            if self.keeps_order and list(dict.fromkeys(planned.layer_map)) != list(range(num_layers)):
                return f"layer_map must have the {num_layers} layers in their order, each before its copies"
            return self.map_of(before, planned.layer_map)
        target = planned.n_layers if planned.n_layers is not None else num_layers * (planned.factor or 1)
        if target <= num_layers:
            return f"{target} layers are not more than the {num_layers} there are"
        sources = self.pattern(num_layers, target)
        return sources if isinstance(sources, str) else self.map_of(before, sources)

    @abstractmethod
    def pattern(self, num_layers: int, target: int) -> Sequence[int] | str:
        """Source of each of `target` layers; or why there is none."""

    def map_of(self, before: DecoderConfig, sources: Sequence[int]) -> GrowthMap:
        """The map of these sources, `NEW` for a layer without one."""
        layers = tuple(None if source == NEW else source for source in sources)
        return GrowthMap(before=before, after=replace(before, num_layers=len(sources)), layers=layers)


@register_operator("stack")
class Stack(DepthOperator):
    """G_stack: layer i comes from layer i mod l. With L no multiple of l the last copy is cut short ("partial stack").

    Not function preserving: the loss jumps and recovers within few steps.
    """

    def pattern(self, num_layers: int, target: int) -> Sequence[int] | str:
        return [layer % num_layers for layer in range(target)]


@register_operator("interpose")
class Interpose(DepthOperator):
    """Layer i comes from layer floor(i l / L): for whole g that is floor(i / g). Not function preserving."""

    def pattern(self, num_layers: int, target: int) -> Sequence[int] | str:
        return [layer * num_layers // target for layer in range(target)]


@register_operator("middle")
class Middle(DepthOperator):
    """The b = L - l layers in the middle twice in a row: 0 .. s+b-1, s .. l-1 with s = floor((l - b) / 2), b <= l."""

    def pattern(self, num_layers: int, target: int) -> Sequence[int] | str:
        block = target - num_layers
        if block > num_layers:
            return f"adds {block} layers, more than the {num_layers} there are; grow in two stages"
        start = (num_layers - block) // 2
        return [*range(start + block), *range(start, num_layers)]


@register_operator("map")
class Map(DepthOperator):
    """The sources as the stage's `layer_map` lists them. Not function preserving: new layers count at once."""

    makes_new = True
    copies = False

    def base(self, after: DecoderConfig, planned: PlannedGrowth) -> DecoderConfig | str:
        return "needs growth.base.n_layers, because a layer_map does not tell how many layers there were"

    def pattern(self, num_layers: int, target: int) -> Sequence[int] | str:
        return "needs a layer_map"


@register_operator("zero_depth")
class ZeroDepth(Interpose):
    """G_zero over depth (Du et al., App. A): copies whose writing projections, wo and w2, are zero.

    In Y = X + MHA(Norm(X)), Y = X + SwiGLU(Norm(X)) such a block is the identity, so the grown model computes bit for
    bit the same. Each copy follows its source, as in the paper's code. Its other weights train from the second step on.
    """

    keeps_order = True

    def map_of(self, before: DecoderConfig, sources: Sequence[int]) -> GrowthMap:
        return replace(super().map_of(before, sources), silent_copies=True, tolerance=0.0)


@register_operator("random_depth")
class RandomDepth(Interpose):
    """G_random over depth (Du et al., Eq. 34-36): new layers start random, and what they add is masked.

    Y = X + MHA(Norm(X)) * c, Y = X + SwiGLU(Norm(X)) * c, with c going from 0 to 1 over `mask_steps` steps. At c = 0
    the grown model computes bit for bit the same. The new layers stand where interposition would put copies.
    """

    keeps_order = True
    copies = False

    def pattern(self, num_layers: int, target: int) -> Sequence[int] | str:
        return super().pattern(num_layers, target) if num_layers else [NEW] * target

    def map_of(self, before: DecoderConfig, sources: Sequence[int]) -> GrowthMap:
        known = super().map_of(before, sources)
        layers = tuple(
            source if original else None for source, original in zip(known.layers, known.is_original_layer, strict=True)
        )
        return replace(known, layers=layers, masked=True, tolerance=0.0)
