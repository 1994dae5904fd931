"""Hooks that measure the activations of forward passes by layer.

**Counted once.** Recomputation runs what is inside a block a second time, and compiled code contains it. So a hook in
there only *overwrites* a buffer of its module, which may happen twice. A hook of the block itself, which is outside of
both, adds the buffers up right after each forward pass. It is a buffer of the module, because blocks share compiled
code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from titan_growth.models.decoder import Decoder
from titan_growth.models.layer_groups import WHOLE, LayerGroups, group_of_child
from titan_growth.models.roles import Role
from titan_growth.tools.shards import local_of

BUFFER = "last_activation"
"""Buffer of a module inside a block: `statistics` of its last output."""


@dataclass
class ForwardMeter:
    """What this rank has measured in the forward passes of a step. All tensors are float64, on the compute device."""

    groups: LayerGroups
    layers: bool = False
    """Whether activations are measured now. Compiled code depends on it."""
    attention: bool = False
    """Whether attention logits are."""
    sums: Tensor = field(init=False)
    """(slots, 2): squares and number of the activations."""
    largest: Tensor = field(init=False)
    """(slots,): the largest magnitude of an activation."""
    logits: Tensor = field(init=False)
    """(layers,): the largest attention logit."""

    def start(self, device: torch.device, *, layers: bool, attention: bool) -> None:
        """Before the first forward pass of a step."""
        self.layers, self.attention = layers, attention
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        if layers:
            self.sums = torch.zeros(self.groups.num_slots, 2, **options)
            self.largest = torch.full((self.groups.num_slots,), -math.inf, **options)
        if attention:
            self.logits = torch.full((self.groups.num_layers,), -math.inf, **options)

    def stop(self) -> None:
        """After the last one."""
        self.layers = self.attention = False

    def add_logits(self, layer: int, largest_N: Tensor) -> None:
        """Takes the largest logit of each head of a layer in one pass."""
        torch.maximum(self.logits[layer], largest_N.amax().double(), out=self.logits[layer])

    def add(self, slots: slice, measured: Tensor) -> None:
        """Adds `statistics`, (number of slots, 3)."""
        self.sums[slots] += measured[:, :2]
        torch.maximum(self.largest[slots], measured[:, 2], out=self.largest[slots])


def statistics(output: Tensor) -> Tensor:
    """(3,), float64: sum of squares, number and largest magnitude of this rank's elements of an activation.

    Norms of single positions come first, in float32: a position is on one rank whatever the mesh, and its elements are
    few enough that rounding does not matter. They are added in float64.
    """
    values = local_of(output.detach())
    norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).double()
    largest = torch.linalg.vector_norm(values, ord=math.inf, dtype=torch.float32).double()
    return torch.stack((norms.square().sum(), torch.full_like(largest, values.numel()), largest))


# ---- activations -----------------------------------------------------------------------------------------------------


def hook_activations(part: Decoder, meter: ForwardMeter, roles: Mapping[str, Role]) -> None:
    """Measures the outputs of blocks, of the modules in them, of the embedding and of the last norm."""
    for layer, block in part.layers.items():
        children: dict[str, list[nn.Module]] = {}
        for name, child in block.named_children():
            if (group := group_of_child(roles, name)) in meter.groups.in_layer:
                child.register_buffer(BUFFER, torch.empty(3, dtype=torch.float64), persistent=False)
                child.register_forward_hook(_Child(meter))
                children.setdefault(group, []).append(child)
        block.register_forward_hook(_Block(meter, int(layer), children))
    for group, module in (("embedding", part.tok_embeddings), ("norm", part.norm)):
        if module is not None:
            module.register_forward_hook(_Around(meter, meter.groups.slot_around(group)))


@dataclass
class _Child:
    """Hook of a module in a block."""

    meter: ForwardMeter

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.meter.layers and torch.is_grad_enabled():
            with torch.no_grad():
                getattr(module, BUFFER).copy_(statistics(output))


@dataclass
class _Block:
    """Hook of a block, to measure its output and collect what was measured in it."""

    meter: ForwardMeter
    layer: int
    children: dict[str, list[nn.Module]]

    def __call__(self, _block: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.meter.layers and torch.is_grad_enabled():
            rows = [self._row(group, output) for group in self.meter.groups.in_layer]
            self.meter.add(self.meter.groups.slots_of(self.layer), torch.stack(rows))

    def _row(self, group: str, output: Tensor) -> Tensor:
        if group == WHOLE:
            return statistics(output)
        measured = [getattr(child, BUFFER) for child in self.children.get(group, ())]
        if not measured:
            return output.new_zeros(3, dtype=torch.float64)
        stacked = torch.stack(measured)
        return torch.cat((stacked[:, :2].sum(dim=0), stacked[:, 2:].amax(dim=0)))


@dataclass
class _Around:
    """Hook of a module outside the blocks."""

    meter: ForwardMeter
    slot: int

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.meter.layers and torch.is_grad_enabled():
            self.meter.add(slice(self.slot, self.slot + 1), statistics(output)[None])
