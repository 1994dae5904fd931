"""How much of a model each rank holds, by arithmetic: no devices, no process groups, and never the whole model.

A parameter is split up to three times. The pipeline assigns whole layers. Tensor parallelism shards what the family's
`tensor_parallel_plan` names, along the first dimension (output channels, vocabulary) or the second (input channels),
and replicates the rest. FSDP shards the result along the first dimension over `dp_shard x cp`. Both shard as
`torch.chunk` does: equal sizes, rounded up, so the last shards may be smaller or empty.

All layers are alike, so one layer on the meta device gives the shapes of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from types import ModuleType

from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.layout.pipeline_parts import Part
from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import with_layer
from titan_growth.optimizers.base import optimizer_named

EMBEDDING, LAYER, NORM, HEAD = "tok_embeddings", "layers", "norm", "output"
"""The units that a pipeline assigns, by the first component of their parameters' names."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, and how tensor parallelism shards it."""

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    """The dimension sharded over `tp`; None if replicated."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    def local_numel(self, mesh: MeshShape, tp_rank: int, fsdp_rank: int) -> int:
        """Elements that one rank holds; `fsdp_rank` is its index in `dp_shard x cp`."""
        sizes = list(self.shape)
        if self.tp_dim is not None:
            sizes[self.tp_dim] = chunk_size(sizes[self.tp_dim], mesh.tp, tp_rank)
        sizes[0] = chunk_size(sizes[0], mesh.fsdp_degree, fsdp_rank)
        return prod(sizes)


def chunk_size(size: int, num_chunks: int, index: int) -> int:
    """Length of chunk `index` of `torch.chunk`; 0 for chunks that it does not make."""
    step = -(-size // num_chunks)
    return max(0, min(step, size - index * step))


@dataclass(frozen=True)
class Held:
    """Elements that the ranks of one `pp` coordinate hold; with uneven shards some hold less than others."""

    least: int
    most: int


class ModelShards:
    """The parameters of a model at one depth, and each rank's shards of them on a mesh.

    Args:
        weight: how often each parameter counts.
    """

    def __init__(
        self,
        config: DecoderConfig,
        family: ModuleType,
        mesh: MeshShape,
        weight: Callable[[Parameter], int] = lambda parameter: 1,
    ) -> None:
        self.config = config
        self.family = family
        self.mesh = mesh
        self.weight = weight
        self.pieces = _pieces(replace(config, num_layers=1), family)

    def numel(self, piece: str) -> int:
        """Elements of the embedding, one layer, the norm or the head."""
        return sum(self.weight(parameter) * parameter.numel for parameter in self.pieces[piece])

    def moments(self, section: OptimizerConfig) -> ModelShards:
        """The same of what an optimizer keeps: each parameter counts as often as it has moments."""

        kind = optimizer_named(section.name)

        def num_moments(parameter: Parameter) -> int:
            return sum(kept.power is not None for kept in kind.rule_of(parameter.name, len(parameter.shape)).state)

        return ModelShards(self.config, self.family, self.mesh, num_moments)

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter of the model; a tied head is none."""
        for piece, ones in self.pieces.items():
            if piece == LAYER:
                for layer, one in product(range(self.config.num_layers), ones):
                    yield replace(one, name=with_layer(one.name, layer))
            elif piece != HEAD or not self.config.tie_word_embeddings:
                yield from ones

    @property
    def num_params(self) -> int:
        """All parameters; a tied head counts once."""
        return self.num_stored - (self.numel(HEAD) if self.config.tie_word_embeddings else 0)

    @property
    def num_stored(self) -> int:
        """Elements of the weights in a checkpoint, which also stores a tied head under its own name."""
        return self.config.num_layers * self.numel(LAYER) + sum(map(self.numel, (EMBEDDING, NORM, HEAD)))

    def pieces_of(self, part: Part) -> Iterator[tuple[str, int]]:
        """(piece, count) of a part. A tied head is a copy unless its embedding is in the same part."""
        if part.first:
            yield EMBEDDING, 1
        yield LAYER, len(part.layers)
        if part.last:
            yield NORM, 1
            if not (part.first and self.config.tie_word_embeddings):
                yield HEAD, 1

    def local_numel(self, parts: tuple[Part, ...], tp_rank: int, fsdp_rank: int) -> int:
        """Elements of some parts on the ranks with these coordinates."""
        local = self._local[tp_rank, fsdp_rank]
        return sum(count * local[piece] for part in parts for piece, count in self.pieces_of(part))

    def held(self, parts: tuple[Part, ...]) -> Held:
        """The least and most elements that the ranks holding these parts have of them."""
        shares = [self.local_numel(parts, *coordinates) for coordinates in self._local]
        return Held(min(shares), max(shares))

    @cached_property
    def _local(self) -> dict[tuple[int, int], dict[str, int]]:
        """(tp rank, fsdp rank) -> elements of each piece on that rank."""
        return {
            (tp_rank, fsdp_rank): {
                piece: sum(
                    self.weight(parameter) * parameter.local_numel(self.mesh, tp_rank, fsdp_rank)
                    for parameter in parameters
                )
                for piece, parameters in self.pieces.items()
            }
            for tp_rank, fsdp_rank in product(range(self.mesh.tp), range(self.mesh.fsdp_degree))
        }


@lru_cache
def _pieces(config: DecoderConfig, family: ModuleType) -> dict[str, tuple[Parameter, ...]]:
    """The parameters of each piece, from a one-layer model."""
    import torch

    with torch.device("meta"):
        model = family.Decoder(config, 1)  # the sequence length sizes buffers, not parameters
    plan = family.tensor_parallel_plan(model)
    pieces: dict[str, list[Parameter]] = {piece: [] for piece in (EMBEDDING, LAYER, NORM, HEAD)}
    # A tied head is the embedding's tensor here, but a copy where a pipeline separates them.
    for name, tensor in model.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        parameter = Parameter(name, tuple(tensor.shape), _tp_dim(plan.get(module), leaf))
        pieces[name.split(".")[0]].append(parameter)
    return {piece: tuple(parameters) for piece, parameters in pieces.items()}


def _tp_dim(split: object, leaf: str) -> int | None:
    from titan_growth.models.decoder import Split

    if split is Split.ROWS:
        return 1 if leaf == "weight" else None  # a bias is added after the sum
    return 0 if split in (Split.COLUMNS, Split.VOCABULARY, Split.HEAD) else None
