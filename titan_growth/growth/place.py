"""Writes a stored chunk into a shard of the grown model, scaled, without a copy of either.

Growth maps consist of runs: a whole layer, half of the channels, a head. A run is copied as a slice, and a scaled one
is multiplied straight into the shard. Only maps with very short runs (every channel twice, side by side) are gathered
element by element, a few rows at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_growth.growth.axes import NEW
from titan_growth.growth.rules import Rule
from titan_growth.models.initialize import ROWS_PER_BLOCK

SHORTEST_RUN = 16
"""In positions. A map with shorter runs on average is gathered: every slice costs a call."""

Positions = tuple[int, ...] | range
Places = slice | Tensor


class Run(NamedTuple):
    """Consecutive positions of a shard that come from consecutive stored ones."""

    here: int
    there: int
    length: int

    def within(self, start: int, length: int) -> Run:
        """The part within a chunk; `there` then counts from the chunk's start."""
        first, last = max(self.there, start), min(self.there + self.length, start + length)
        return Run(self.here + first - self.there, first - start, max(0, last - first))


@functools.lru_cache(maxsize=1024)
def runs(positions: Positions) -> tuple[Run, ...]:
    """The runs of a map, as few as possible; positions without a source are in no run."""
    if isinstance(positions, range):
        return (Run(0, positions.start, len(positions)),)
    found: list[Run] = []
    begin = 0
    for end in range(1, len(positions) + 1):
        if end < len(positions) and positions[end] == positions[end - 1] + 1 and positions[end - 1] != NEW:
            continue
        if positions[begin] != NEW:
            found.append(Run(begin, positions[begin], end - begin))
        begin = end
    return tuple(found)


def place(
    values: Tensor,
    offsets: Sequence[int],
    local: Tensor,
    positions: Sequence[Positions],
    begin: Sequence[int],
    rule: Rule,
) -> None:
    """Writes a stored chunk's part of a shard into it, scaled as its rule says.

    Args:
        values, offsets: the chunk, and its place in the stored tensor.
        local, begin: the shard, and its place in the grown tensor.
        positions: of the shard's elements in the stored tensor, for each dimension (`read.Box`).
    """
    selections = [
        _selection([run.within(start, size) for run in runs(one)])
        for one, start, size in zip(positions, offsets, values.shape, strict=True)
    ]
    gathers = any(isinstance(here, Tensor) for choices in selections for here, _ in choices)
    if selections and (gathers or local.device.type != "cpu"):  # both copy, so in small parts
        selections[0] = list(_few_rows(selections[0]))
    for block in itertools.product(*selections):
        piece = values
        for dim, (_, there) in enumerate(block):
            if isinstance(there, slice):
                piece = piece.narrow(dim, there.start, there.stop - there.start)
            else:
                piece = piece.index_select(dim, there)
        places = [here for here, _ in block]
        _write(local, places, piece, list(_factors(rule, begin, places, local)))


def _selection(found: list[Run]) -> list[tuple[Places, Places]]:
    """(places in the shard, places in the chunk) along one dimension, slice by slice or all at once."""
    found = [run for run in found if run.length]
    if sum(run.length for run in found) >= SHORTEST_RUN * len(found) or len(found) == 1:
        return [(slice(here, here + length), slice(there, there + length)) for here, there, length in found]
    here = torch.cat([torch.arange(run.here, run.here + run.length) for run in found])
    there = torch.cat([torch.arange(run.there, run.there + run.length) for run in found])
    return [(here, there)]


def _few_rows(choices: list[tuple[Places, Places]]) -> Iterator[tuple[Places, Places]]:
    """The same selection of rows in small parts."""
    for here, there in choices:
        if isinstance(here, Tensor) and isinstance(there, Tensor):
            yield from zip(here.split(ROWS_PER_BLOCK), there.split(ROWS_PER_BLOCK), strict=True)
            continue
        assert isinstance(here, slice), "both sides of a run are slices"
        assert isinstance(there, slice), "both sides of a run are slices"
        for start in range(0, here.stop - here.start, ROWS_PER_BLOCK):
            stop = min(start + ROWS_PER_BLOCK, here.stop - here.start)
            yield slice(here.start + start, here.start + stop), slice(there.start + start, there.start + stop)


def _factors(rule: Rule, begin: Sequence[int], places: Sequence[Places], local: Tensor) -> Iterator[float | Tensor]:
    """The factors on a piece, in the rule's order; each broadcasts to it."""
    if rule.scale != 1.0:
        yield rule.scale
    for dim, scales in enumerate(rule.scales):
        if scales is None:
            continue
        share = _tensor(scales, local.dtype)[begin[dim] : begin[dim] + local.shape[dim]][places[dim]]
        yield share.to(local.device).reshape([-1 if d == dim else 1 for d in range(local.dim())])


@functools.lru_cache(maxsize=64)
def _tensor(scales: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(scales, dtype=dtype)


def _write(local: Tensor, places: Sequence[Places], piece: Tensor, factors: Sequence[float | Tensor]) -> None:
    slices = tuple(one for one in places if isinstance(one, slice))
    piece = piece.to(local.device)
    if len(slices) == len(places):
        target = local[slices]
        if not factors:
            target.copy_(piece)
            return
        torch.mul(piece, factors[0], out=target)
        for factor in factors[1:]:
            target.mul_(factor)
        return
    for factor in factors:
        piece = piece * factor
    if len(places) - len(slices) == 1:
        local[tuple(one.to(local.device) if isinstance(one, Tensor) else one for one in places)] = piece
        return
    grid = [torch.arange(one.start, one.stop) if isinstance(one, slice) else one for one in places]
    local[tuple(one.to(local.device) for one in torch.meshgrid(*grid, indexing="ij"))] = piece
