"""Growth operators: pure functions on configs and layer numbers.

An operator says which config a model grows into, and from which source layer each layer of the grown model is filled.
It never touches a tensor: the checkpoint reader does that, on any mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from titan_growth.models.config import ModelConfig


class DepthOperator(Protocol):
    """What an operator provides."""

    def grow(self, config: ModelConfig, factor: int) -> ModelConfig:
        """The config of the grown model."""
        ...

    def source_of(self, num_layers: int, factor: int) -> tuple[int, ...]:
        """Source layer of each layer of the grown model."""
        ...


_OPERATORS: dict[str, DepthOperator] = {}


def register_operator(name: str) -> Callable[[type], type]:
    """Class decorator: makes an operator known to recipes under a name."""

    def register(kind: type) -> type:
        assert name not in _OPERATORS, f"two operators are called {name!r}"
        _OPERATORS[name] = kind()
        return kind

    return register


def operators() -> dict[str, DepthOperator]:
    """All operators by name."""
    return dict(_OPERATORS)


@register_operator("stack")
@dataclass(frozen=True)
class Stack:
    """G_stack, the depthwise G_direct of Du et al. (NeurIPS 2024, Alg. 1): M_target = M o M o ... o M.

    The whole list of layers is repeated `factor` times in order, so layer i comes from layer i mod l. Embedding, final
    norm and head are copied. Not function preserving: the loss jumps and recovers within few steps.
    """

    def grow(self, config: ModelConfig, factor: int) -> ModelConfig:
        return replace(config, num_layers=config.num_layers * factor)

    def source_of(self, num_layers: int, factor: int) -> tuple[int, ...]:
        return tuple(layer % num_layers for layer in range(num_layers * factor))
