"""Do boxes make up a tensor, without gaps and without overlaps?

Comparing every box with every other takes too long for a hundred thousand of them. Count their corners instead, those
of even parity as +1 and those of odd parity as -1, at the same place together. Inside a tiling the corners that meet
cancel, and what is left over are those of the whole. The converse holds, too: the signed corners of a sum of boxes are
its mixed derivative, and determine it. So the boxes make up the whole if, and only if, their corners do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

MAX_SPLIT_DIMS = 4
"""Dimensions that a tensor may be split along: 16 corners a box."""


Box = tuple[Sequence[int], Sequence[int]]
"""The first corner, and the lengths of the sides."""


def gap(size: Sequence[int], boxes: Sequence[Box]) -> str:
    """What is wrong with boxes that should make up a tensor of the given size; "" when they do.

    Boxes without content are passed over. All others must have as many dimensions as the tensor and lie inside it.
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
