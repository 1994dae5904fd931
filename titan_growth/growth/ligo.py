"""G_learn, or LiGO (Wang et al., ICLR 2023; Du et al., App. A): the growth itself is learned, for a short while.

Every parameter of the grown model is a linear function of the small one's,

    W'_l = B_out (sum_j D_lj W_j) B_in^T        Du et al., Eq. 37-42

with one D (L x l) for each kind of parameter of a block, and one B for each width axis: the residual stream, the SwiGLU
layer, and the heads, which are mixed whole (B = H x identity of a head), so that RoPE and the pairing of queries with
keys survive. D starts as stacked identities, so over depth the growth starts as G_stack; B as [I; noise / sqrt(D)].

While it learns, the grown model runs as always, on any mesh: its weights are made from (B, D), its backward pass gives
the gradient G of every shard, and the chain rule from there is three products:

    dB_out = G B_in M^T      dB_in = G^T B_out M      dD_lj = <B_out^T G B_in, W_j>      M = sum_j D_lj W_j

Each rank computes them for its own shards, and the small results are summed over all ranks. Unlike other operators, it
holds the whole small model on each rank. Moments cannot be carried through, so they are reset.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titan_growth.checkpoint.reader import SafeReader
from titan_growth.growth.multipliers import carried
from titan_growth.growth.operators.base import GrowthMap
from titan_growth.models.initial_values import InitialValues
from titan_growth.models.initialize import draw, local_and_offset
from titan_growth.models.roles import Role, axis_lengths, layer_of, role_of, with_layer
from titan_growth.tools.collectives import gather_objects
from titan_growth.tools.gradients import reduced

HEAD_AXES = ("heads", "kv_heads")


@dataclass(frozen=True)
class Shard:
    """This rank's box of a parameter of the grown model."""

    name: str
    kind: str
    """Its name without the layer."""
    layer: int | None
    role: Role
    parameter: Tensor
    local: Tensor
    offset: tuple[int, ...]
    share: float
    """1 / the number of ranks with the same box, so that a sum over all ranks counts it once."""


class LearnedGrowth:
    """The maps B and D, and what they make of the small model.

    Args:
        source: the small model's step folder.
        growth_map: what the growth starts from.
        parameters: of the grown model, by name, in use.
        roles: of the family.
        seed: of the noise that B starts with.
        device: that the products are computed on.
    """

    def __init__(
        self,
        source: Path,
        growth_map: GrowthMap,
        parameters: Mapping[str, Tensor],
        *,
        roles: Mapping[str, Role],
        seed: int,
        device: torch.device,
    ) -> None:
        self.growth_map = growth_map
        self.device = device
        self.shards = self._shards(parameters, roles)
        self.block_kinds: set[str] = set()
        reader = SafeReader(source)
        self.sources = self._read(reader, roles)
        self.num_bytes_read = reader.num_bytes_read
        self.widths = {axis: self._first_width(axis, seed).to(device) for axis in sorted(growth_map.axes)}
        # D starts as the layer map says: stacked identities, for G_stack.
        depth = torch.zeros(growth_map.after.num_layers, growth_map.before.num_layers)
        for layer, origin in enumerate(growth_map.layers):
            assert origin is not None, "a learned growth starts from copies"
            depth[layer, origin] = 1.0
        self.depths = {kind: depth.clone().to(device) for kind in sorted(self.block_kinds)}

    @property
    def maps(self) -> list[Tensor]:
        """Everything that is learned, in an order that all ranks share."""
        return [*self.widths.values(), *self.depths.values()]

    def _shards(self, parameters: Mapping[str, Tensor], roles: Mapping[str, Role]) -> list[Shard]:
        tied = self.growth_map.after.tied
        boxes = {name: local_and_offset(parameter.detach()) for name, parameter in parameters.items()}
        of_rank = [(name, offset, tuple(local.shape)) for name, (local, offset) in boxes.items()]
        holders = Counter(itertools.chain.from_iterable(gather_objects(of_rank)))
        shards = []
        for name, (local, offset) in boxes.items():
            layer = layer_of(name)
            kind = name if layer is None else name.replace(f"layers.{layer}.", "", 1)
            # The gradient of a tied copy is that of both names, and must count once.
            share = 0.0 if name in tied else 1.0 / holders[name, offset, tuple(local.shape)]
            role = role_of(roles, tied.get(name, name))
            shards.append(Shard(name, kind, layer, role, parameters[name], local, offset, share))
        return shards

    def _read(self, reader: SafeReader, roles: Mapping[str, Role]) -> dict[str, Tensor]:
        """Kind -> the small model's tensor, or those of its layers stacked."""
        chunks = reader.chunks()
        sizes = {name: entry.size for name, entry in reader.tensor_entries().items()}

        def whole(name: str) -> Tensor:
            tensor = torch.empty(sizes[name], dtype=chunks[name][0].dtype)
            for chunk in chunks[name]:
                box = tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))
                tensor[box] = reader.read_chunk(chunk)
            return tensor.to(self.device, torch.float32)

        found = {}
        for kind in sorted(roles):
            in_block = f"layers.0.{kind}"
            if in_block in chunks:
                names = [with_layer(in_block, layer) for layer in range(self.growth_map.before.num_layers)]
                found[kind] = torch.stack([whole(name) for name in names])
                self.block_kinds.add(kind)
            elif kind in chunks:
                found[kind] = whole(kind)
        return found

    def _first_width(self, axis: str, seed: int) -> Tensor:
        """[I; noise / sqrt(D)], over whole heads where the axis is made of heads."""
        width = self._width_unit(axis)
        old, new = (axis_lengths(config)[axis] // width for config in (self.growth_map.before, self.growth_map.after))
        first = torch.empty(new, old)
        draw(first, (0, 0), first.shape, f"ligo.{axis}", InitialValues(1 / math.sqrt(new)), seed)
        first[:old] = torch.eye(old)
        return first

    def _width_unit(self, axis: str) -> int:
        return self.growth_map.before.head_dim if axis in HEAD_AXES else 1

    def _expansion(self, shard: Shard, dim: int) -> Tensor | None:
        """The rows of B for a shard's dimension, (local length, old length); None for an axis that does not grow."""
        axis = shard.role.dims[dim]
        if axis not in self.widths:
            return None
        unit, learned = self._width_unit(axis), self.widths[axis]
        whole = torch.kron(learned, torch.eye(unit, device=learned.device)) if unit > 1 else learned
        return whole[shard.offset[dim] : shard.offset[dim] + shard.local.shape[dim]]

    def _mixed(self, shard: Shard) -> Tensor:
        """M: the small model's tensor that a shard is expanded from, cut to the shard along axes that do not grow."""
        mixed = self.sources[shard.kind]
        if shard.layer is not None:
            mixed = torch.einsum("j,j...->...", self.depths[shard.kind][shard.layer], mixed)
        return self._box(shard, mixed)

    def _box(self, shard: Shard, tensor: Tensor) -> Tensor:
        for dim, axis in enumerate(shard.role.dims):
            if axis not in self.widths:
                tensor = tensor.narrow(dim, shard.offset[dim], shard.local.shape[dim])
        return tensor

    @torch.no_grad()
    def write(self) -> None:
        """Puts W' into the shards."""
        for shard in self.shards:
            if shard.local.numel():
                shard.local.copy_(self._made(shard))

    def _made(self, shard: Shard) -> Tensor:
        values = self._mixed(shard) * carried(self.growth_map, shard.role, shard.name)
        rows = self._expansion(shard, 0)
        values = values if rows is None else rows @ values
        if len(shard.role.dims) == 2 and (columns := self._expansion(shard, 1)) is not None:
            values = values @ columns.T
        return values

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Gradients of `maps` from those of the parameters, which are dropped; the same on every rank."""
        widths = {axis: torch.zeros_like(tensor) for axis, tensor in self.widths.items()}
        depths = {kind: torch.zeros_like(tensor) for kind, tensor in self.depths.items()}
        for shard in self.shards:
            gradient = shard.parameter.grad
            shard.parameter.grad = None
            if gradient is None or not shard.local.numel() or not shard.share:
                continue
            local, _ = local_and_offset(reduced(gradient, shard.parameter))
            share = shard.share * carried(self.growth_map, shard.role, shard.name)
            self._backward(shard, local.to(self.device, torch.float32) * share, widths, depths)
        found = [*widths.values(), *depths.values()]
        if dist.get_world_size() > 1:
            for gradient in found:
                dist.all_reduce(gradient)
        return found

    def _backward(self, shard: Shard, g: Tensor, widths: dict[str, Tensor], depths: dict[str, Tensor]) -> None:
        mixed = self._mixed(shard)
        rows = self._expansion(shard, 0)
        columns = self._expansion(shard, 1) if len(shard.role.dims) == 2 else None
        right = g if columns is None else g @ columns
        left = mixed if rows is None else rows @ mixed
        if rows is not None:
            self._add(shard, 0, right.outer(mixed) if g.dim() == 1 else right @ mixed.T, widths)
        if columns is not None:
            self._add(shard, 1, g.T @ left, widths)
        if shard.layer is not None:
            inner = right if rows is None else rows.T @ right
            stack = torch.stack([self._box(shard, one) for one in self.sources[shard.kind]])
            depths[shard.kind][shard.layer] += stack.flatten(1) @ inner.flatten()

    def _add(self, shard: Shard, dim: int, gradient: Tensor, widths: dict[str, Tensor]) -> None:
        """Adds the gradient of some rows of B to the whole; for an axis of heads, summed within each head."""
        axis = shard.role.dims[dim]
        unit = self._width_unit(axis)
        start = shard.offset[dim]
        if unit == 1:
            widths[axis][start : start + gradient.shape[0]] += gradient
            return
        learned = widths[axis]
        whole = gradient.new_zeros(learned.shape[0] * unit, learned.shape[1] * unit)
        whole[start : start + gradient.shape[0]] = gradient
        blocks = whole.reshape(learned.shape[0], unit, learned.shape[1], unit)
        learned += torch.einsum("ncmc->nm", blocks)


def learn(
    learned: LearnedGrowth, *, steps: int, lr: float, train_step: Callable[[], float], max_norm: float = 1.0
) -> list[float]:
    """Learns the maps for some steps; the parameters then hold the result. Returns the loss of each step.

    AdamW under a warmup over half of the steps and a linear decay to a tenth, as the authors of Du et al. use it.

    Args:
        train_step: runs the model on the next batch, leaves gradients, and returns the loss.
    """
    maps = [torch.nn.Parameter(tensor) for tensor in learned.maps]
    optimizer = torch.optim.AdamW(maps, lr=lr, weight_decay=0.0)
    losses = []
    learned.write()
    for step in range(1, steps + 1):
        losses.append(train_step())
        for parameter, gradient in zip(maps, learned.gradients(), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(maps, max_norm)
        half = max(1, steps // 2)
        share = step / half if step <= half else 1.0 - 0.9 * (step - half) / max(1, steps - half)
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        optimizer.step()
        learned.write()
    return losses
