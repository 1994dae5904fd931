"""How a family's models are laid out in a Hugging Face folder: a table beside the math, the only place that knows.

A family with such a table (`HUGGING_FACE` in its module) can be imported, exported, trained from and grown from.
Parameter names are written as in `ROLES`: those of a block without the `layers.<n>.` prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import Role, axis_lengths, bare_name, layer_of, role_of

_FRAME = ("tok_embeddings.weight", "norm.weight", "output.weight")
"""Parameters outside the blocks: the first comes before them, the others after."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceLayout:
    """A family's names, channel orders and settings in `transformers`."""

    model_type: str
    """Of config.json; identifies the family of a folder."""
    architecture: str
    """The entry of config.json's `architectures`."""
    names: Mapping[str, str]
    """Our name -> the name in `transformers`, both without the layer."""
    layer_prefix: str = "model.layers."
    """What precedes the layer's number in `transformers`."""
    neighbours: frozenset[str] = frozenset()
    """Parameters whose rows are head channels that rotate in pairs (2i, 2i + 1) here and (i, i + head_dim / 2) in
    `transformers`. Their rows are permuted within each head; nothing else differs."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of missing keys of config.json."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key of config.json -> the values that this family's math supports. The first is the default of a missing key, and
    the one written."""
    ignored: tuple[str, ...] = ()
    """Suffixes of stored tensors to skip: their values follow from config.json."""
    heads_divide_width: bool = False
    """`transformers` requires a width that is a multiple of the number of heads, whatever the head width."""

    def name_of(self, parameter: str) -> str:
        """The name in `transformers` of one of our parameters, with its layer."""
        layer, name = layer_of(parameter), self.names[bare_name(parameter)]
        return name if layer is None else f"{self.layer_prefix}{layer}.{name}"

    def group_of(self, parameter: str, config: DecoderConfig) -> int | None:
        """The number of rows within which a parameter's rows are permuted, or None if they are not."""
        return config.head_dim if bare_name(parameter) in self.neighbours else None


def parameter_shapes(config: DecoderConfig, roles: Mapping[str, Role]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter of a whole model, in layer order, without building it.

    Copies of tied parameters are listed too, as in our checkpoints.
    """
    lengths = {**axis_lengths(config), "head_dim": config.head_dim, "vocab": config.vocab_size}
    of_blocks = [name for name in roles if name not in _FRAME]
    names = [_FRAME[0], *(f"layers.{n}.{name}" for n in range(config.num_layers) for name in of_blocks), *_FRAME[1:]]
    for name in names:
        yield name, tuple(lengths[axis] for axis in role_of(roles, name).dims)
