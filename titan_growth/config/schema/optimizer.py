"""The `[optimizer]` table and its parameter groups."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from titan_growth.config.section import BadValueError, Section


class ParameterGroupConfig(Section):
    """Parameters that the optimizer treats in a way of their own."""

    pattern: str = Field(min_length=1)
    """Names of the parameters, with * for any characters: "*norm.weight", "layers.0.*". The first group that matches
    a name has it."""
    lr_factor: float = Field(1.0, ge=0)
    """Factor on the learning rate of every step."""
    weight_decay_factor: float | None = Field(None, ge=0)
    """Factor on weight_decay. Default: 1, or 0 where weight_decay_on leaves the parameter out."""
    frozen: bool = False
    """Never updated; its gradient does not count in the gradient norm. Moments are kept, as zeros."""

    @model_validator(mode="after")
    def _says_something(self) -> ParameterGroupConfig:
        given = self.lr_factor != 1.0 or self.weight_decay_factor is not None
        if self.frozen and given:
            raise BadValueError("is frozen, so lr_factor and weight_decay_factor have no meaning", "Remove them")
        if not self.frozen and not given:
            raise BadValueError("changes nothing", "Give lr_factor, weight_decay_factor or frozen")
        return self


class OptimizerConfig(Section):
    """The optimizer; its hyper-parameters always come from the recipe, never from a checkpoint."""

    name: str = "AdamW"
    """Adam, AdamW, or Muon: for the matrices of the layers, with AdamW for everything else. Plugins add others."""
    lr: float = Field(8e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """all parameters, as torchtitan does; or matrices only: no decay on norms, biases and the embedding."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How PyTorch runs Adam's update."""
    options: dict[str, Any] = {}
    """What else the optimizer takes. Muon: momentum (0.95), nesterov (true), ns_steps (5) and adjust_lr_fn
    ("match_rms_adamw", or "original"), as in torch.optim.Muon."""
    qk_clip: float = Field(0.0, ge=0)
    """Threshold of attention logits: wq and wk of a head that exceeded it in a step are scaled down after it (QK-clip,
    Kimi K2: 100); 0 = none. Models with QK-norm need none. Not a key of torchtitan."""
    qk_clip_interval: int = Field(1, ge=1)
    """Look at the logits every this many steps only: looking costs another product of queries and keys."""
    groups: list[ParameterGroupConfig] = []
    """See [[optimizer.groups]]: learning rate and weight decay by name of the parameter."""
