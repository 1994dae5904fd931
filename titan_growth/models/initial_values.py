"""What a parameter's initial values are drawn from: the schemes of `[model.init]`.

    group       parameters            torchtitan             normal        small          gstack
    embedding   tok_embeddings        1                      std           dim ** -0.5    1, normal
    head        output                dim ** -0.5            std           dim ** -0.5    1 / sqrt(3 fan_in), uniform
    readers     wq, wk, wv, w1, w3    0.02 (w3: / depth)     std           as torchtitan  1 / sqrt(3 fan_in), uniform
    writers     wo, w2                0.02 / depth           std / depth   as torchtitan  1 / sqrt(3 fan_in), uniform

Writers add to the residual stream; "/ depth" is a division by sqrt(2 * depth), depth being the layer's own counted from
1 (`model.depth_init = true`) or the model's. Norms start at one.

"torchtitan" is how torchtitan starts Llama 3, w3 included. "normal" is GPT-2's (Radford et al., 2019) at
`depth_init = false`. "small" lets the residual stream begin with a vector of length 1 instead of sqrt(dim), so that the
first layers count. "gstack" is what the G_stack paper's released script starts from: it never calls its own
initialisation, so PyTorch's defaults for `nn.Linear` and `nn.Embedding` stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Scheme = Literal["torchtitan", "normal", "small", "gstack"]
Group = Literal["embedding", "head", "readers", "writers"]

TRUNCATED_AT = 3
"""Deviations at which the normal distribution ends."""


class InitialValues(NamedTuple):
    """The distribution of a parameter's initial values, around zero."""

    std: float
    """Standard deviation; of the normal distribution before it is truncated."""
    uniform: bool = False
    """Uniform, and not a normal distribution truncated at `TRUNCATED_AT` deviations."""

    @property
    def limit(self) -> float:
        """The largest magnitude of a value."""
        return self.std * (math.sqrt(3) if self.uniform else TRUNCATED_AT)

    def times(self, factor: float) -> InitialValues:
        """The same distribution, wider or narrower."""
        return InitialValues(self.std * factor, self.uniform)


@dataclass(frozen=True)
class InitScheme:
    """A scheme and what replaces parts of it. A group's deviation is before the division for depth."""

    scheme: Scheme = "torchtitan"
    std: float = 0.02
    """Of "normal"."""
    embedding_std: float | None = None
    head_std: float | None = None
    readers_std: float | None = None
    writers_std: float | None = None

    def values(self, group: Group, *, dim: float, fan_in: float, depth: int | None, tied: bool) -> InitialValues:
        """The initial values of a parameter.

        Args:
            dim: width of the residual stream.
            fan_in: inputs of the matrix product.
            depth: where the deviation shrinks with the depth, that depth, counted from 1.
            tied: the embedding is the head too, and starts as one.
        """
        if group == "embedding" and tied:
            group = "head"
        uniform = self.scheme == "gstack" and group != "embedding"
        given: float | None = getattr(self, f"{group}_std")
        std = given if given is not None else self._std(group, dim, fan_in)
        shrinks = depth is not None and not uniform
        return InitialValues(std / math.sqrt(2 * (depth or 1)) if shrinks else std, uniform)

    def _std(self, group: Group, dim: float, fan_in: float) -> float:
        if self.scheme == "gstack":
            return 1.0 if group == "embedding" else 1 / math.sqrt(3 * fan_in)
        if self.scheme == "normal":
            return self.std
        if group == "embedding":
            return 1.0 if self.scheme == "torchtitan" else dim**-0.5
        return dim**-0.5 if group == "head" else 0.02


TORCHTITAN = InitScheme()
"""The default."""
