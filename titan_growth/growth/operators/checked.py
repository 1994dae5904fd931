"""Asking an operator: its answers are those of its contract, or one sentence says which is not.

A plugin's operator may return anything. A map that does not fit its models would end in the middle of a growth, or pass
and train another model than the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields

from titan_growth.config.plugins import origin_of
from titan_growth.config.schema.growth import SIZES, WIDTHS, PlannedGrowth
from titan_growth.growth.axes import NEW, AxisMap, width_problem
from titan_growth.growth.operators.base import GrowthMap, Operator
from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import axis_lengths
from titan_growth.tools.text import one_line

_MAY_CHANGE = {*SIZES.values(), "norm_eps", "qk_norm_eps"}
"""Fields of a model that a growth may change."""


class NoAnswer(str):
    """A sentence about a defect of the operator, whatever the recipe says."""

    __slots__ = ()


def base_of(operator: Operator, after: DecoderConfig, planned: PlannedGrowth) -> DecoderConfig | str:
    """The model that a growth must start from to end at `after`; or why it cannot be derived."""
    answer: object = operator.base(after, planned)
    if isinstance(answer, str):
        return answer
    if not isinstance(answer, DecoderConfig):
        return _no_answer(operator, "base", f"returned {_shown(answer)}, neither a DecoderConfig nor a sentence")
    wrong = next(_wrong_sizes(answer), None)
    return answer if wrong is None else _no_answer(operator, "base", f"returned a model whose {wrong}")


def map_of(operator: Operator, before: DecoderConfig, planned: PlannedGrowth) -> GrowthMap | str:
    """The map of a growth from `before`; or what is wrong with the planned growth, or with the operator."""
    answer: object = operator.grow(before, planned)
    if isinstance(answer, str):
        return answer
    if not isinstance(answer, GrowthMap):
        return _no_answer(operator, "grow", f"returned {_shown(answer)}, neither a GrowthMap nor a sentence")
    if wrong := next(_wrong_map(operator, before, answer), None):
        return _no_answer(operator, "grow", f"returned a map that cannot be: {wrong}")
    factor = planned.factor
    if factor is not None and not any(
        after == factor * before.sizes[key] for key, after in answer.after.sizes.items() if after != before.sizes[key]
    ):
        changed = ", ".join(f"{key} {old} -> {answer.after.sizes[key]}" for key, old in before.sizes.items()
                            if answer.after.sizes[key] != old)  # fmt: skip
        reason = f"makes {changed or 'no other size'} with factor = {factor}. If it sets the size itself, write"
        return _no_answer(operator, "grow", f"{reason} sets_size = True in the class, and no factor in the recipe")
    return answer


def _no_answer(operator: Operator, method: str, what: str) -> NoAnswer:
    return NoAnswer(f"{origin_of(type(operator))}.{method} {what}")


def _shown(value: object) -> str:
    return one_line(repr(value), 60)


def _wrong_sizes(config: DecoderConfig) -> Iterator[str]:
    for key, size in config.sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < (0 if key == "n_layers" else 1):
            yield f"{key} is {_shown(size)}"


def _wrong_map(operator: Operator, before: DecoderConfig, growth: GrowthMap) -> Iterator[str]:
    """What keeps a map from being carried out, the first first."""
    after = growth.after
    for name, config in (("before", growth.before), ("after", after)):
        if not isinstance(config, DecoderConfig):
            yield f"`{name}` is {_shown(config)}, no DecoderConfig"
            return
        for wrong in _wrong_sizes(config):
            yield f"in `{name}` {wrong}"
            return
    if growth.before != before:
        yield "`before` is another model than the one that grows"
    if others := [field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)
                  and field.name not in _MAY_CHANGE]:  # fmt: skip
        yield f"`after` has another {others[0]}, which no growth changes"
    yield from _wrong_layers(operator, growth)
    yield from _wrong_axes(operator, growth)
    yield from _wrong_settings(growth)


def _wrong_settings(growth: GrowthMap) -> Iterator[str]:
    for name in ("silent_copies", "rescale_norms", "masked", "learned"):
        if not isinstance(getattr(growth, name), bool):
            yield f"`{name}` is {_shown(getattr(growth, name))}, not True or False"
    if growth.new_channels not in ("zero", "random"):
        yield f"`new_channels` is {_shown(growth.new_channels)}, not 'zero' or 'random'"
    tolerance: object = growth.tolerance
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < math.inf):
        yield f"`tolerance` is {_shown(tolerance)}, not a number of at least 0, or None"


def _wrong_layers(operator: Operator, growth: GrowthMap) -> Iterator[str]:
    layers: object = growth.layers
    if not isinstance(layers, tuple):
        yield f"`layers` is {_shown(layers)}, no tuple"
        return
    if len(layers) != growth.after.num_layers:
        yield f"`layers` has {len(layers)} sources for {growth.after.num_layers} layers"
    for layer in layers:
        if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
            yield f"`layers` holds {_shown(layer)}, neither a layer's number nor None"
            return
        if layer is not None and not 0 <= layer < growth.before.num_layers:
            yield f"`layers` names layer {layer}, and the model has 0 to {growth.before.num_layers - 1}"
            return
    if "depth" not in operator.grows and layers != tuple(range(growth.before.num_layers)):
        yield "`layers` changes the depth, which the class's `grows` does not name"


def _wrong_axes(operator: Operator, growth: GrowthMap) -> Iterator[str]:
    before, after, axes = axis_lengths(growth.before), axis_lengths(growth.after), growth.axes
    if not isinstance(axes, Mapping) or not all(isinstance(one, AxisMap) for one in axes.values()):
        yield f"`axes` is {_shown(axes)}, no table of AxisMaps"
        return
    if problem := width_problem(growth.before, growth.after):
        yield problem
    if others := [axis for axis in axes if axis not in before]:
        yield f"`axes` names {_shown(others[0])}; the axes are {', '.join(before)}"
        return
    if "width" not in operator.grows and (
        axes or any(getattr(growth.before, field) != getattr(growth.after, field) for field in WIDTHS.values())
    ):
        yield "it changes a width, which the class's `grows` does not name"
    for axis, length in before.items():
        one = axes.get(axis)
        if one is None and after[axis] != length:
            yield f"`axes` has no {axis}, which grows from {length} to {after[axis]}"
        if one is None:
            continue
        if (one.num_sources, len(one.source)) != (length, after[axis]):
            sizes = f"{one.num_sources} to {len(one.source)}, and the model grows from {length} to {after[axis]}"
            yield f"axis {axis} goes from {sizes}"
        elif beyond := [at for at in one.source if not isinstance(at, int) or not NEW <= at < length]:
            yield f"axis {axis} names position {_shown(beyond[0])}, and there are 0 to {length - 1}"
