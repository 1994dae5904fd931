"""What a parameter's dimensions mean: all that width growth knows about a model.

A family lists its parameters by name (`ROLES`), those of a block without `layers.<n>.`. The axes are

    dim        the residual stream                     hidden_dim   the SwiGLU layer
    heads      query heads x head_dim                  kv_heads     key/value heads x head_dim
    head_dim   one head, which never grows             vocab        rows of the embedding, which never grow
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from titan_growth.models.config import BaseSizes, DecoderConfig

RESIDUAL = "dim"

OPTIMIZER_PREFIX = "optimizer.state."
"""Stored optimizer state is named so: this, the parameter, and which state of it."""

_SHADOW = re.compile(r"shadow\.(\w+)\.")

_LAYER = re.compile(r"(?<![^.])layers\.(\d+)\.")


@dataclass(frozen=True)
class Role:
    """The axes of a parameter's dimensions."""

    dims: tuple[str, ...]
    reads: int | None = None
    """The dimension that a matrix product sums over; None without one (norms, the embedding)."""

    @property
    def writes_residual(self) -> bool:
        """Whether the output is added to the residual stream: at zero, such a projection removes its branch."""
        return self.reads is not None and self.dims[0] == RESIDUAL

    @property
    def is_norm(self) -> bool:
        """Whether it is the weight of a norm."""
        return len(self.dims) == 1


def axis_lengths(config: DecoderConfig | BaseSizes) -> dict[str, int]:
    """The length of each axis that can grow."""
    return {
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
    }


def shadow_prefix(kind: str) -> str:
    """What the names of a kind of shadow weights begin with; the parameter's name follows."""
    return f"shadow.{kind}."


def prefix_of_shadow(name: str) -> str:
    """The prefix of a shadow weight's name; empty for any other tensor."""
    match = _SHADOW.match(name)
    return match[0] if match else ""


def shadow_kinds(names: Iterable[str]) -> set[str]:
    """The kinds of shadow weights among some names."""
    return {match[1] for name in names if (match := _SHADOW.match(name))}


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to, from its name; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def with_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    return _LAYER.sub(f"layers.{layer}.", name, count=1)


def bare_name(name: str) -> str:
    """The name without its layer, as in `ROLES`."""
    return _LAYER.sub("", name, count=1)


def role_of(roles: Mapping[str, Role], name: str) -> Role:
    """The role of a parameter. Every parameter must have one: a missing entry is a bug in the family."""
    bare = bare_name(name)
    assert bare in roles, f"the family's ROLES do not list {bare}"
    return roles[bare]
