"""Shadow weights: a second set of a model's weights, which belongs to a stage.

They are float32 and sharded as the model's own, so updating them needs no communication. In checkpoints they stand
under the weights' names behind a prefix, and are saved, resharded and grown as weights are: neither checkpoints nor
growth know what they are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from titan_growth.models.roles import shadow_prefix
from titan_growth.stages.base import BuildContext, Stage
from titan_growth.tools.shards import local_of, plain


class Shadow:
    """The shadow weights of one stage, beside the weights of this rank's parts.

    Args:
        stage: that keeps them.
        parts: materialised; their values may change, and so may those of the shadow weights, which are not filled yet.
    """

    def __init__(self, stage: Stage, parts: Iterable[nn.Module]) -> None:
        self.stage = stage
        self.tensors: dict[str, Tensor] = {}
        """By their names in checkpoints; one of a tied parameter has both names."""
        self._pairs: list[tuple[Tensor, nn.Parameter]] = []
        made: dict[nn.Parameter, Tensor] = {}
        for part in parts:
            for name, weight in part.named_parameters(remove_duplicate=False):
                if weight not in made:
                    made[weight] = torch.zeros_like(plain(weight.detach()), dtype=torch.float32)
                    self._pairs.append((made[weight], weight))
                self.tensors[f"{shadow_prefix(stage.name)}{name}"] = made[weight]

    @property
    def kind(self) -> str:
        """The name of the stage."""
        return self.stage.name

    @property
    def _shards(self) -> list[Tensor]:
        return [local_of(mean) for mean, _ in self._pairs]

    @property
    def _weights(self) -> list[Tensor]:
        # The shard first: an operation on a DTensor costs the host far more, and this is asked for in every step.
        return [plain(local_of(weight).detach()) for _, weight in self._pairs]

    @torch.no_grad()
    def start(self) -> None:
        """Makes them equal to the weights."""
        for mean, weight in zip(self._shards, self._weights, strict=True):
            mean.copy_(weight)

    @torch.no_grad()
    def update(self, context: BuildContext) -> None:
        """Lets the stage update them."""
        self.stage.update_shadow(self._shards, self._weights, context)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the model these weights for a while.

        Its own are set aside on the device, where there are no gradients between two steps: memory peaks no higher.
        """
        own = [weight.clone() for weight in self._weights]
        self._put(self._shards)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)
