"""A run's tensors by name: weights, moments, random states.

Weights have their bare names, moments are `optimizer.state.<weight>.<exp_avg|exp_avg_sq|step>`, as in torchtitan's
checkpoints. There are no byte entries: everything that is not a tensor is JSON beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from titan_growth.engine.optimizer import Optimizer
from titan_growth.models.roles import OPTIMIZER_PREFIX
from titan_growth.tools.shards import plain


def model_tensors(parts: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of this rank's parts; the live tensors, to save from or load into."""
    return {name: plain(tensor.detach()) for part in parts for name, tensor in part.state_dict(keep_vars=True).items()}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The moments and step counters of this rank's parameters."""
    return {f"{OPTIMIZER_PREFIX}{name}.{key}": plain(tensor) for name, key, tensor in optimizer.named_state()}


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """This rank's random states."""
    states = {f"rng.rank_{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"rng.rank_{rank}.cuda"] = torch.cuda.get_rng_state()
    return states


def stored_rng(rank: int, stored: Collection[str]) -> dict[str, Tensor]:
    """Tensors to load this rank's random states into, if the checkpoint has them: it may be from fewer ranks."""
    return {name: state for name, state in rng_tensors(rank).items() if name in stored}


def set_rng(rank: int, states: dict[str, Tensor]) -> None:
    """Sets this rank's random states to the loaded ones."""
    if f"rng.rank_{rank}.cpu" in states:
        torch.set_rng_state(states[f"rng.rank_{rank}.cpu"])
    if f"rng.rank_{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"rng.rank_{rank}.cuda"])
