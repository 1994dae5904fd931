"""The growth itself: every rank makes its shards of the grown model from the stored chunks of the small one.

    rule of each tensor -> which stored chunks overlap its shard -> each chunk read once -> placed, scaled -> filled

Nothing is gathered and nothing is planned together; the ranks only agree on whether all have succeeded. A chunk that
feeds many tensors (a layer that is stacked four times) is read once for all of them, and freed before the next is read;
indexing and drawing go a few rows at a time. So a rank needs memory for its grown shards and the largest stored chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.growth.axes import NEW
from titan_growth.growth.place import place
from titan_growth.growth.rules import Rule, Rules
from titan_growth.models.initial_values import InitialValues
from titan_growth.models.initialize import ROWS_PER_BLOCK, draw, local_and_offset
from titan_growth.models.roles import OPTIMIZER_PREFIX


@dataclass(frozen=True)
class Box:
    """A rank's part of a tensor, and the stored positions of its elements."""

    local: Tensor
    offset: tuple[int, ...]
    rule: Rule
    positions: tuple[tuple[int, ...] | range, ...]
    """For each dimension, the stored position of each local one, `NEW` for none."""

    @classmethod
    def of(cls, tensor: Tensor, rule: Rule) -> Box:
        local, offset = local_and_offset(tensor)
        indices = rule.indices or (None,) * local.dim()
        positions = tuple(
            range(start, start + length) if index is None else index[start : start + length]
            for index, start, length in zip(indices, offset, local.shape, strict=True)
        )
        return cls(local, offset, rule, positions)

    def parts(self) -> Iterator[Box]:
        """The box in parts of a few rows, to keep temporaries small.

        Parts end where the blocks of the initial distribution do, so that no block is drawn twice.
        """
        if self.local.dim() < 2:
            yield self
            return
        num_rows, (first, *others) = self.local.shape[0], self.offset
        start = 0
        while start < num_rows:
            stop = min(num_rows, start + ROWS_PER_BLOCK - (first + start) % ROWS_PER_BLOCK)
            positions = (self.positions[0][start:stop], *self.positions[1:])
            yield Box(self.local[start:stop], (first + start, *others), self.rule, positions)
            start = stop

    def overlaps(self, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether any element comes from a stored chunk."""
        return all(_overlaps(*span) for span in zip(self.positions, offsets, sizes, strict=True))


def read_grown(stored: SafeReader, tensors: Mapping[str, Tensor], rules: Rules, *, seed: int) -> None:
    """Fills the tensors of a grown model in place, from the small model's checkpoint.

    Args:
        stored: reader of the small model's step folder.
        tensors: parameters and optimizer state by name, plain or sharded, of any values.
        rules: how each of them is made.
        seed: of this growth; the same on every rank. New values depend on it, on the name and on the place, and not on
            the mesh.

    Raises:
        CheckpointError: when a source is not stored, has another type, or cannot be read.
    """
    chunks = stored.chunks()
    boxes = {name: Box.of(tensor, rules.of(name)) for name, tensor in _once(tensors).items()}
    wanted: dict[StoredChunk, list[Box]] = {}
    for name, box in boxes.items():
        if box.rule.source is None:
            box.local.zero_()
            continue
        if box.rule.source not in chunks:
            raise stored.refused(f"it has no {box.rule.source}, which {name} comes from")
        if any(NEW in positions for positions in box.positions if not isinstance(positions, range)):
            box.local.zero_()
        for chunk in chunks[box.rule.source]:
            if chunk.dtype != box.local.dtype:
                message = f"{box.rule.source} is stored as {chunk.dtype}, and {name} is {box.local.dtype}"
                raise stored.refused(message)
            if box.overlaps(chunk.offsets, chunk.sizes):
                wanted.setdefault(chunk, []).append(box)
    # One after another into the same memory: an allocator may hold on to several large freed pieces.
    buffer = torch.empty(max((chunk.num_bytes for chunk in wanted), default=0), dtype=torch.uint8)
    for chunk in sorted(wanted, key=lambda chunk: (chunk.file, chunk.begin)):
        values = stored.read_chunk(chunk, buffer)
        for box in wanted[chunk]:
            place(values, chunk.offsets, box.local, box.positions, box.offset, box.rule)
    for name, box in boxes.items():
        for part in box.parts():
            if not name.startswith(OPTIMIZER_PREFIX):
                finish(part, tensors[name].shape, rules.initial_values(part.rule.parameter), seed)


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without second names: a tied head is listed twice, and must not be scaled twice."""
    seen: set[tuple[int, torch.Size]] = set()
    once = {}
    for name, tensor in tensors.items():
        local, _ = local_and_offset(tensor)
        place = (local.data_ptr(), tensor.shape)
        if local.numel() == 0 or place not in seen:
            once[name] = tensor
            seen.add(place)
    return once


def _overlaps(positions: Sequence[int], start: int, length: int) -> bool:
    if isinstance(positions, range):
        return positions.start < start + length and start < positions.stop and length > 0
    return any(start <= position < start + length for position in positions)


def finish(box: Box, shape: torch.Size, initial: InitialValues | None, seed: int) -> None:
    """Adds initial values and noise to a parameter, once all stored values are in place."""
    rule, local = box.rule, box.local
    if not local.numel():
        return
    if rule.initial and (new := new_elements(box)) is not None:
        values = torch.empty_like(local)
        draw(values, box.offset, shape, rule.parameter, initial, _seed(seed, "new"))
        local.copy_(torch.where(new.to(local.device), values, local))
    if rule.noise and initial is not None and (copies := copied_elements(box)) is not None:
        noise = torch.empty_like(local)
        draw(noise, box.offset, shape, rule.parameter, initial.times(rule.noise), _seed(seed, "noise"))
        local.add_(torch.where(copies.to(local.device), noise, torch.zeros_like(noise)))


def new_elements(box: Box) -> Tensor | None:
    """Which elements of a box have no source, as a mask that broadcasts to it; None when all have one."""
    if box.rule.source is None:
        return torch.ones([1] * box.local.dim(), dtype=torch.bool)
    positions_of = {dim: one for dim, one in enumerate(box.positions) if not isinstance(one, range)}
    return _any(box, {dim: [position == NEW for position in one] for dim, one in positions_of.items()})


def copied_elements(box: Box) -> Tensor | None:
    """Which elements of a box are copies, neither original nor new, as a mask that broadcasts to it; None for none."""
    if box.rule.source is None:
        return None
    new = new_elements(box)
    has_source = torch.ones([1] * box.local.dim(), dtype=torch.bool) if new is None else ~new
    if box.rule.copied_layer:
        return has_source
    copied = {}
    for dim, originals in enumerate(box.rule.originals):
        if originals is not None:
            start = box.offset[dim]
            copied[dim] = [not original for original in originals[start : start + box.local.shape[dim]]]
    copies = _any(box, copied)
    return None if copies is None else copies & has_source


def _any(box: Box, marked: Mapping[int, Sequence[bool]]) -> Tensor | None:
    """Elements that are marked along any dimension."""
    found: Tensor | None = None
    for dim, mask in marked.items():
        if any(mask):
            spread = torch.tensor(mask).reshape([-1 if d == dim else 1 for d in range(box.local.dim())])
            found = spread if found is None else found | spread
    return found


def _seed(seed: int, purpose: str) -> int:
    digest = hashlib.sha256(f"{seed}/growth/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
