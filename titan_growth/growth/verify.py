"""After a growth: is every element what its rule says, and does the model compute what it should?

The check does not trust the read that it checks. It reads the small model's checkpoint again, one stored tensor at a
time, computes the expected values in one expression, and compares bit for bit. New values must be zero or within the
range of their distribution; all must be finite. That costs one more read of what this rank holds, and memory for one
stored tensor, a stored chunk of it and a few rows.

`check_preserved` compares the loss before and after with what the operator declares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.config.schema.recipe import TrainingConfig
from titan_growth.growth.axes import NEW
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.growth.read import Box, copied_elements, new_elements
from titan_growth.growth.rules import Rules
from titan_growth.models.initial_values import InitialValues
from titan_growth.models.roles import OPTIMIZER_PREFIX
from titan_growth.tools.errors import GrowthError


def verify_growth(stored: SafeReader, tensors: Mapping[str, Tensor], rules: Rules) -> list[str]:
    """Compares this rank's shards of a grown model with the checkpoint it was made from.

    Returns:
        What is wrong, a line for each tensor.
    """
    chunks = stored.chunks()
    buffer = torch.empty(max(piece.num_bytes for pieces in chunks.values() for piece in pieces), dtype=torch.uint8)
    by_source: dict[str | None, list[str]] = {}
    boxes = {name: Box.of(tensor, rules.of(name)) for name, tensor in tensors.items()}
    for name, box in boxes.items():
        by_source.setdefault(box.rule.source, []).append(name)
    wrong: list[str] = []
    for source, names in by_source.items():
        span, dense = None, None
        for name in names:
            box = boxes[name]
            if not box.local.numel():
                continue
            initial = None if name.startswith(OPTIMIZER_PREFIX) else rules.initial_values(box.rule.parameter)
            if source is not None and _span(box) != span:  # the layers that a layer was stacked to share it
                dense = None  # before the next one is read
                span = _span(box)
                dense = _dense(stored, chunks[source], span, box.local.dtype, buffer)
            wrong += _compare_parts(name, box, dense, span.starts if span is not None else (), initial)
    return wrong


def _compare_parts(
    name: str, box: Box, dense: Tensor | None, starts: Sequence[int], initial: InitialValues | None
) -> list[str]:
    """What is wrong with the first bad part of a shard. Keeps no view of `dense`."""
    for part in box.parts():
        expected = None if dense is None else _expected(part, dense, starts)
        if problems := _compare(name, part, expected, initial):
            return problems
    return []


class Span(NamedTuple):
    """A box of a stored tensor."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    """One beyond the last, in each dimension."""


def _span(box: Box) -> Span:
    """The smallest box of the stored tensor that holds all sources of a shard."""
    known = [[position for position in positions if position != NEW] for positions in box.positions]
    starts = tuple(min(positions, default=0) for positions in known)
    return Span(starts, tuple(max(positions, default=-1) + 1 for positions in known))


def _dense(stored: SafeReader, chunks: Sequence[StoredChunk], span: Span, dtype: torch.dtype, buffer: Tensor) -> Tensor:
    """A box of a stored tensor, put together from its pieces."""
    starts, stops = span
    sizes = [max(0, stop - start) for start, stop in zip(starts, stops, strict=True)]
    dense = torch.full(sizes, torch.nan, dtype=dtype)
    for chunk in chunks:
        spans = [
            (max(start, offset), min(stop, offset + size))
            for start, stop, offset, size in zip(starts, stops, chunk.offsets, chunk.sizes, strict=True)
        ]
        if any(first >= last for first, last in spans):
            continue
        here = tuple(slice(first - at, last - at) for (first, last), at in zip(spans, chunk.offsets, strict=True))
        there = tuple(slice(first - at, last - at) for (first, last), at in zip(spans, starts, strict=True))
        dense[there] = stored.read_chunk(chunk, buffer)[here]
    return dense


def _expected(box: Box, values: Tensor, starts: Sequence[int]) -> Tensor:
    """What a part of a shard must be where it has a source; undefined elsewhere.

    Args:
        values: a box of the stored tensor with all of its sources.
        starts: where that box begins.
    """
    rule = box.rule
    for dim, (positions, start) in enumerate(zip(box.positions, starts, strict=True)):
        if isinstance(positions, range):
            values = values.narrow(dim, positions.start - start, len(positions))
            continue
        if values.shape[dim] == 0:
            return torch.zeros(box.local.shape, dtype=box.local.dtype)
        values = values.index_select(dim, (torch.tensor(positions) - start).clamp_min(0))
    if rule.scale != 1.0:
        values = values * rule.scale
    for dim, scales in enumerate(rule.scales):
        if scales is not None:
            share = torch.tensor(scales, dtype=values.dtype)[box.offset[dim] :][: box.local.shape[dim]]
            values = (values.movedim(dim, -1) * share).movedim(-1, dim)
    return values


def _compare(name: str, box: Box, expected: Tensor | None, initial: InitialValues | None) -> list[str]:
    found = box.local.detach().cpu()
    if not found.numel():
        return []
    if not bool(torch.isfinite(found).all()):
        source = f", as its source {box.rule.source} is" if expected is not None and _not_finite(expected, box) else ""
        return [f"{name} is not finite{source}"]
    new = new_elements(box)
    new = torch.zeros([1] * found.dim(), dtype=torch.bool) if new is None else new
    new = new.expand_as(found)
    wrong = []
    if expected is not None:
        noisy = copied_elements(box) if box.rule.noise and initial is not None else None
        exact = ~new if noisy is None else ~new & ~noisy
        if not torch.equal(found[exact], expected[exact]):
            wrong.append(f"{name} differs from its source {box.rule.source}")
        elif noisy is not None and initial is not None:
            difference = (found.float() - expected.float()).abs()[noisy.expand_as(found)]
            most = initial.limit * box.rule.noise
            most += 2 * torch.finfo(found.dtype).eps * (float(expected.abs().max()) + most)  # the sum is rounded
            if difference.numel() and float(difference.max()) > most:
                wrong.append(f"{name} differs from its source {box.rule.source} by more than its noise")
    fresh = found[new]
    if fresh.numel():
        limit = 0.0 if not box.rule.initial else 1.0 if initial is None else initial.limit
        if bool((fresh.abs() > limit * (1 + torch.finfo(found.dtype).eps)).any()):
            what = "zero" if limit == 0 else f"within {limit:.3g}"
            wrong.append(f"{name} has new elements that are not {what}")
    return wrong


def _not_finite(expected: Tensor, box: Box) -> bool:
    new = new_elements(box)
    known = expected if new is None else expected[~new.expand_as(expected)]
    return not bool(torch.isfinite(known).all())


def allowed_change(tolerance: float, training: TrainingConfig) -> float:
    """How far a loss may move, relative, when the operator allows `tolerance` of exact arithmetic.

    The grown model sums over more channels, with kernels of another size: in float32 that changes a loss by 1e-6, in
    bfloat16, which rounds every product and the residual stream, by 1e-2.
    """
    exact = {training.mixed_precision_param, training.dtype} == {"float32"}
    return max(tolerance, 1e-5 if exact else 1e-2)


def check_preserved(
    operator: str, growth_map: GrowthMap, before: float, after: float, training: TrainingConfig
) -> None:
    """Checks that an operator that declares to preserve the function has done so.

    Args:
        before, after: loss on the same held-out batch.

    Raises:
        GrowthError: with both losses.
    """
    if growth_map.tolerance is None:
        return
    allowed = allowed_change(growth_map.tolerance, training)
    change = abs(after - before) / max(abs(before), 1e-12)
    if not change <= allowed:
        raise GrowthError(
            f"the operator '{operator}' declares that it preserves the function, but on the same held-out batch the "
            f"loss went from {before:.8f} to {after:.8f}, by {change:.1e} where {allowed:.0e} is allowed. "
            "The small model's checkpoint is whole"
        )
