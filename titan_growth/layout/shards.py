"""How much of a model each rank holds, by arithmetic: no devices, no process groups, and never the whole model.

A parameter is cut up to three times. The pipeline gives each rank whole layers. Tensor parallelism cuts what the
family's `tensor_parallel_plan` names, along the first dimension (output channels, vocabulary) or the second (input
channels); the rest is held by all `tp` ranks. FSDP cuts what is left along the first dimension over `dp_shard x cp`.
Both cuts are `torch.chunk`'s: pieces of equal, rounded up size, so the last ones may be shorter or empty.

All layers of a model are alike, so one of them on the meta device tells the shapes of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from types import ModuleType

from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.layout.pipeline_parts import Part
from titan_growth.models.config import DecoderConfig

EMBEDDING, LAYER, NORM, HEAD = "tok_embeddings", "layers", "norm", "output"
"""The pieces that a pipeline deals out, by the first word of their parameters' names."""


@dataclass(frozen=True)
class Parameter:
    """One parameter, and how tensor parallelism cuts it."""

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    """The dimension that is cut over `tp`; None: every `tp` rank holds all of it."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    def local_numel(self, mesh: MeshShape, tp_rank: int, fsdp_rank: int) -> int:
        """Elements that one rank holds; `fsdp_rank` counts `dp_shard x cp`."""
        sizes = list(self.shape)
        if self.tp_dim is not None:
            sizes[self.tp_dim] = chunk_size(sizes[self.tp_dim], mesh.tp, tp_rank)
        sizes[0] = chunk_size(sizes[0], mesh.fsdp_degree, fsdp_rank)
        return prod(sizes)


def chunk_size(size: int, num_chunks: int, index: int) -> int:
    """The length of one of the chunks that `torch.chunk` makes; 0 for those that it does not make."""
    step = -(-size // num_chunks)
    return max(0, min(step, size - index * step))


@dataclass(frozen=True)
class Held:
    """What the ranks of one `pp` coordinate hold, in elements; uneven cuts make some hold less than others."""

    parts: tuple[Part, ...]
    least: int
    most: int


class ModelShards:
    """The parameters of a model of one depth, and each rank's share of them on a mesh.

    Args:
        family: the model family's module.
    """

    def __init__(self, config: DecoderConfig, family: ModuleType, mesh: MeshShape) -> None:
        self.config = config
        self.mesh = mesh
        self.pieces = _pieces(replace(config, num_layers=1), family)

    def numel(self, piece: str) -> int:
        """Elements of the embedding, of one layer, of the norm or of the head."""
        return sum(parameter.numel for parameter in self.pieces[piece])

    @property
    def num_params(self) -> int:
        """All parameters; a tied head counts once."""
        head = 0 if self.config.tie_word_embeddings else self.numel(HEAD)
        return self.numel(EMBEDDING) + self.config.num_layers * self.numel(LAYER) + self.numel(NORM) + head

    @property
    def num_stored(self) -> int:
        """Elements of the weights in a checkpoint, which stores a tied head under its own name too."""
        return self.num_params + (self.numel(HEAD) if self.config.tie_word_embeddings else 0)

    def pieces_of(self, part: Part) -> Iterator[tuple[str, int]]:
        """(piece, how many) of a part. A tied head is a copy, unless its embedding is in the same part."""
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
        return sum(number * local[piece] for part in parts for piece, number in self.pieces_of(part))

    def held(self, parts: tuple[Part, ...]) -> Held:
        """What the ranks that hold some parts have of them."""
        shares = [self.local_numel(parts, *coordinates) for coordinates in self._local]
        return Held(parts, min(shares), max(shares))

    @cached_property
    def _local(self) -> dict[tuple[int, int], dict[str, int]]:
        """(tp rank, fsdp rank) -> elements of each piece there."""
        return {
            (tp_rank, fsdp_rank): {
                piece: sum(parameter.local_numel(self.mesh, tp_rank, fsdp_rank) for parameter in parameters)
                for piece, parameters in self.pieces.items()
            }
            for tp_rank, fsdp_rank in product(range(self.mesh.tp), range(self.mesh.fsdp_degree))
        }


@lru_cache
def _pieces(config: DecoderConfig, family: ModuleType) -> dict[str, tuple[Parameter, ...]]:
    """The parameters of each piece of a model of one layer."""
    import torch

    with torch.device("meta"):
        model = family.Decoder(config, 1)  # the sequence length makes buffers, not parameters
    plan = family.tensor_parallel_plan(model)
    pieces: dict[str, list[Parameter]] = {piece: [] for piece in (EMBEDDING, LAYER, NORM, HEAD)}
    # A tied head is one tensor with the embedding here, but not where a pipeline has parted them.
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
