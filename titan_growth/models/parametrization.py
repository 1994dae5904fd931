"""muP and CompleteP: one learning rate for all widths and depths, tuned at a base size.

With n = size / base size of the axis that a matrix product sums over (N for the residual stream) and L = layers / base
layers, relative to the standard parametrisation with the same keys at the base size:

                               muP                         CompleteP, in addition
    initial deviation          hidden: n ** -0.5           depth counts as at the base size
    learning rate, Adam        hidden: 1 / n
    learning rate, Muon        hidden: spectral norm of the update ~ sqrt(outputs / inputs)
    weight decay, decoupled    hidden: n                   (learning rate x weight decay stays)
    eps of Adam                1 / N                       layers: 1 / L
    attention                  sqrt(base head) / head instead of 1 / sqrt(head)
    logits                     1 / N
    branches                                               1 / L

Hidden are the matrices of the layers; embedding, head and norms keep initial values, learning rate and decay. At its
base size a model is the standard one. muP is that of Yang et al., Tensor Programs V (2022), table 8; CompleteP that of
Dey et al. (2025, arXiv 2505.01618), table 1 with alpha = 1, under which learning rate and decay do not depend on depth.
Eps: gradients shrink by 1 / N with the logits' factor, and by 1 / L within a branch. A rule of the optimizer brings its
own factor (`optimizers/base.py: width_factor`); that of Muon is the spectral condition of Yang, Simon and Bernstein
(2023, arXiv 2310.17813).

The factors of the forward pass are numbers of the model's math, so no stage knows of them. They follow from the
`DecoderConfig`, so each phase of a growing run has its own (`growth/multipliers.py` keeps the function).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from titan_growth.models.config import DecoderConfig
from titan_growth.models.roles import Role, axis_lengths, bare_name, layer_of, role_of


def ratio(config: DecoderConfig, axis: str) -> float:
    """How often an axis has its base length; 1 under the standard parametrisation, and for axes that never grow."""
    lengths = axis_lengths(config)
    if config.mup is None or axis not in lengths:
        return 1.0
    return lengths[axis] / axis_lengths(config.mup)[axis]


def output_scale(config: DecoderConfig) -> float:
    """Factor on the logits."""
    return 1.0 / ratio(config, "dim")


def branch_scale(config: DecoderConfig) -> float:
    """Factor on what attention and SwiGLU add to the residual stream."""
    if config.mup is None or config.mup.num_layers is None:
        return 1.0
    return config.mup.num_layers / max(1, config.num_layers)  # without layers there are no branches


def query_scale(config: DecoderConfig) -> float:
    """Factor on the queries, whose products with keys are divided by sqrt(head_dim)."""
    return 1.0 if config.mup is None else math.sqrt(config.mup.head_dim / config.head_dim)


class Factors(NamedTuple):
    """The factors of a model's forward pass."""

    logits: float = 1.0
    queries: float = 1.0
    branches: float = 1.0

    @classmethod
    def of(cls, config: DecoderConfig) -> Factors:
        """Those of a model."""
        return cls(output_scale(config), query_scale(config), branch_scale(config))

    def __str__(self) -> str:
        return f"logits x {self.logits:g}, queries x {self.queries:g}, branches x {self.branches:g}"


def init_depth(config: DecoderConfig, layer: int) -> int:
    """The depth that initial values shrink with, counted from 1, where the scheme has them shrink."""
    if config.mup is not None and config.mup.num_layers is not None:
        return config.mup.num_layers
    return layer + 1 if config.depth_init else config.num_layers


def output_reader(config: DecoderConfig) -> str:
    """The parameter that takes a factor on the logits: the head, or where that is the embedding too, the norm."""
    return "norm.weight" if config.tie_word_embeddings else "output.weight"


def folded(config: DecoderConfig, roles: Mapping[str, Role], name: str) -> float:
    """Factor on a parameter with which the standard parametrisation computes the same."""
    if name == output_reader(config):
        return output_scale(config)
    if layer_of(name) is None:
        return 1.0
    if role_of(roles, name).writes_residual:
        return branch_scale(config)
    queries = "attention.q_norm.weight" if config.qk_norm else "attention.wq.weight"
    return query_scale(config) if bare_name(name) == queries else 1.0
