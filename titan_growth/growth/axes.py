"""Width growth on paper: for each axis of the model, which old position every new position comes from.

An axis is the residual stream, the SwiGLU layer, or the heads (models/roles.py). Heads are never split and never torn
apart: attention rotates channels by their place in a head (RoPE) and pairs a query head with its key/value head (GQA),
so a key/value head is copied together with its query heads, and a copied query head stays with a copy of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from titan_growth.config.schema.growth import WIDTHS
from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import axis_lengths

NEW = -1
"""The source of a position that has none."""


@dataclass(frozen=True)
class AxisMap:
    """Where the positions of a grown axis come from."""

    source: tuple[int, ...]
    """Old position of each new one, or `NEW`."""
    num_sources: int
    """Length of the old axis."""

    @cached_property
    def is_original(self) -> tuple[bool, ...]:
        """Whether a position is the first one with its source; the others are copies of it, or new."""
        first = {position: place for place, position in reversed([*enumerate(self.source)])}
        return tuple(position != NEW and first[position] == place for place, position in enumerate(self.source))

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """What a reader of the axis multiplies each position by, so that all copies of a source count as one."""
        copies = Counter(self.source)
        return tuple(1.0 if position == NEW else 1.0 / copies[position] for position in self.source)

    @cached_property
    def nearest(self) -> tuple[int, ...]:
        """The source; for a new position, one to borrow statistics from."""
        return tuple(
            place % self.num_sources if position == NEW else position for place, position in enumerate(self.source)
        )

    @property
    def is_uniform(self) -> bool:
        """Whether every source is copied equally often: then the mean square of the axis does not change."""
        return len(set(Counter(self.source).values())) == 1 and NEW not in self.source


Positions = Callable[[int, int], Sequence[int]]
"""(old length, new length) -> source of each new position."""


def repeated(old: int, new: int) -> list[int]:
    """0 1 2 0 1 2 0: copies in turn, so that no position has more than one copy more than another."""
    return [position % old for position in range(new)]


def appended(old: int, new: int) -> list[int]:
    """0 1 2 - - -: what is added is new."""
    return [position if position < old else NEW for position in range(new)]


def axis_maps(before: DecoderConfig, after: DecoderConfig, positions: Positions) -> dict[str, AxisMap]:
    """The map of every axis that differs between two models of one head width."""
    assert before.head_dim == after.head_dim, "heads keep their width"
    kv_heads = list(positions(before.num_kv_heads, after.num_kv_heads))
    per_group = (before.num_heads // before.num_kv_heads, after.num_heads // after.num_kv_heads)
    heads = []
    for group in kv_heads:
        for place in positions(*per_group):
            heads.append(NEW if NEW in (group, place) else group * per_group[0] + place)
    sources = {
        "dim": list(positions(before.dim, after.dim)),
        "hidden_dim": list(positions(before.hidden_dim, after.hidden_dim)),
        "heads": _channels(heads, before.head_dim),
        "kv_heads": _channels(kv_heads, before.head_dim),
    }
    lengths = axis_lengths(before)
    return {
        axis: AxisMap(tuple(source), lengths[axis])
        for axis, source in sources.items()
        if source != list(range(lengths[axis]))
    }


def _channels(heads: Sequence[int], head_dim: int) -> list[int]:
    return [NEW if head == NEW else head * head_dim + channel for head in heads for channel in range(head_dim)]


def width_problem(before: DecoderConfig, after: DecoderConfig) -> str | None:
    """Why one model cannot be widened into another, or None."""
    sizes = {key: (getattr(before, field), getattr(after, field)) for key, field in WIDTHS.items()}
    if smaller := [f"{key} shrinks from {old} to {new}" for key, (old, new) in sizes.items() if new < old]:
        return "; ".join(smaller)
    if before.head_dim != after.head_dim:
        return f"heads would change their width from {before.head_dim} to {after.head_dim}, and no head can be split"
    for config in (before, after):
        if config.num_heads % config.num_kv_heads:
            return f"{config.num_kv_heads} key/value heads do not divide {config.num_heads} query heads"
    old, new = (config.num_heads // config.num_kv_heads for config in (before, after))
    return f"{new} query heads share a key/value head, and {old} did before" if new < old else None
