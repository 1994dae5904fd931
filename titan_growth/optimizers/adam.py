"""Adam and AdamW: PyTorch's, for every parameter alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.optimizers.base import Site, StateTensor, elementwise_width_factor, register_optimizer


@dataclass(frozen=True)
class AdamRule:
    """A mean of gradients over the root of a mean of their squares (Kingma and Ba, 2015)."""

    name: str
    kind: type[torch.optim.Adam]
    state = (StateTensor("exp_avg", 1), StateTensor("exp_avg_sq", 2), StateTensor("step", None))
    width_factor = staticmethod(elementwise_width_factor)
    needs_group = False

    def make(self, groups: list[dict[str, Any]], section: OptimizerConfig, site: Site) -> torch.optim.Optimizer:
        """Everything is elementwise, so PyTorch's own works on shards."""
        return self.kind(
            groups,
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=section.implementation == "fused",
            foreach=section.implementation == "foreach",
        )


ADAMW = AdamRule("AdamW", torch.optim.AdamW)


class _OneRule:
    """An optimizer with one rule for all parameters, and without options."""

    rules: tuple[AdamRule, ...]
    options: Mapping[str, Any] = {}

    def rule_of(self, name: str, num_dims: int) -> AdamRule:
        return self.rules[0]

    def problem(self, options: Mapping[str, Any]) -> str | None:
        return None


@register_optimizer("Adam")
class Adam(_OneRule):
    """Weight decay is part of the gradient."""

    rules = (AdamRule("Adam", torch.optim.Adam),)


@register_optimizer("AdamW")
class AdamW(_OneRule):
    """Weight decay is apart from the gradient (Loshchilov and Hutter, 2019)."""

    rules = (ADAMW,)
