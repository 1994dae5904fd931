"""Do boxes tile a tensor, without gaps or overlaps?

Comparing every pair takes too long for a hundred thousand boxes. Sum their corners instead, per position, even corners
as +1 and odd ones as -1. Inside a tiling, corners that meet cancel, and only those of the whole remain. The converse
holds too: the signed corners of a sum of boxes are its mixed derivative, which determines it. So the boxes tile the
whole if and only if their corners sum to its corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

MAX_SPLIT_DIMS = 4
"""Dimensions a tensor may be split along: 16 corners per box."""


Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes."""


def gap(size: Sequence[int], boxes: Sequence[Box]) -> str:
    """What is wrong with boxes that should tile a tensor of the given size; "" if they do.

    Empty boxes are ignored. All others must have the tensor's number of dimensions and lie inside it.
    """
    boxes = [(offsets, sizes) for offsets, sizes in boxes if all(sizes)]
    if not all(size):
        return "it has no values and they do" if boxes else ""
    if not boxes:
        return "there are none"
    split = [dim for dim, length in enumerate(size) if any(sizes[dim] != length for _, sizes in boxes)]
    if len(split) > MAX_SPLIT_DIMS:
        return f"it is split along {len(split)} dimensions"
    parities = [-1 if sum(ends) % 2 else 1 for ends in product((0, 1), repeat=len(split))]
    corners: dict[tuple[int, ...], int] = {}
    for offsets, sizes in boxes:
        places = product(*((offsets[dim], offsets[dim] + sizes[dim]) for dim in split))
        for place, parity in zip(places, parities, strict=True):
            corners[place] = corners.get(place, 0) + parity
    for place, parity in zip(product(*((0, size[dim]) for dim in split)), parities, strict=True):
        corners[place] = corners.get(place, 0) - parity
    return "they overlap or leave gaps" if any(corners.values()) else ""
