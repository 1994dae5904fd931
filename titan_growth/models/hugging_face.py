"""How a family's models are laid out in a Hugging Face folder: a table beside the math, which no other code repeats.

A family that has such a table (`HUGGING_FACE` in its module) can be imported, exported, trained from and grown from.
The names of parameters are written as in `ROLES`: those of a block without `layers.<n>.` in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import Role, axis_lengths, layer_of, role_of

_FRAME = ("tok_embeddings.weight", "norm.weight", "output.weight")
"""Parameters outside of the blocks: the first one before them, the others after."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceLayout:
    """Names, orders and settings of a family as `transformers` has them."""

    model_type: str
    """Of config.json; it says which family a folder holds."""
    architecture: str
    """The one entry of config.json's `architectures` that this is."""
    names: Mapping[str, str]
    """Parameter -> its name there; both without the number of the layer."""
    layer_prefix: str = "model.layers."
    """What stands before that number there."""
    neighbours: frozenset[str] = frozenset()
    """Parameters whose rows are channels of heads that turn in pairs (2i, 2i + 1) here and (i, i + head_dim / 2)
    there. Their rows have another order in each head; nothing else differs."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key of config.json means when it is missing."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key of config.json -> the values that this family's math fits; a missing key has the first one. The first one
    is also what is written."""
    ignored: tuple[str, ...] = ()
    """Ends of the names of stored tensors that follow from config.json."""
    heads_divide_width: bool = False
    """`transformers` refuses a width that is no multiple of the number of heads, whatever the width of a head."""

    def name_of(self, parameter: str) -> str:
        """The name there of one of our parameters, with its layer."""
        layer = layer_of(parameter)
        if layer is None:
            return self.names[parameter]
        return f"{self.layer_prefix}{layer}.{self.names[parameter.removeprefix(f'layers.{layer}.')]}"

    def group_of(self, parameter: str, config: DecoderConfig) -> int | None:
        """The number of rows in which a parameter's order differs, or None where it does not."""
        layer = layer_of(parameter)
        bare = parameter if layer is None else parameter.removeprefix(f"layers.{layer}.")
        return config.head_dim if bare in self.neighbours else None


def parameter_shapes(config: DecoderConfig, roles: Mapping[str, Role]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter of a whole model, in the order of its layers and without building it.

    A copy of a tied parameter is listed too, as in our checkpoints.
    """
    lengths = {**axis_lengths(config), "head_dim": config.head_dim, "vocab": config.vocab_size}
    bare = list(roles)
    of_blocks = [name for name in bare if name not in _FRAME]
    names = [_FRAME[0], *(f"layers.{n}.{name}" for n in range(config.num_layers) for name in of_blocks), *_FRAME[1:]]
    for name in names:
        yield name, tuple(lengths[axis] for axis in role_of(roles, name).dims)
