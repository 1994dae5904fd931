"""The optimizer of a rank's model parts: gradient clipping, the step, and state by parameter name.

State is created up front, not at the first step, so a checkpoint can be read straight into it. Hyper-parameters are not
state: they always come from the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.engine.build import BuiltModel
from titan_growth.engine.parameter_groups import SizedModel, Treatment, treatment_of
from titan_growth.optimizers.base import Site, StateTensor, UpdateRule, needs_group, optimizer_named
from titan_growth.tools.gradients import reduced
from titan_growth.tools.shards import local_of
from titan_growth.tools.torch_private import foreach_norm


class Optimizer:
    """The recipe's optimizer over the parameters of all parts.

    Args:
        site: where it works, and with whom; by default on this rank's CPU alone.
        tied: copies of parameters -> the name of the original. A copy on another pipeline part has its own moments,
            which stay equal; one in the same part is not a parameter, and its moments go by both names.
        pipeline_group: the ranks that hold the other parts.
        model: what the parts are of; needed under muP and CompleteP.
    """

    def __init__(
        self,
        parts: Iterable[nn.Module],
        section: OptimizerConfig,
        *,
        max_norm: float,
        site: Site | None = None,
        tied: Mapping[str, str] | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        model: SizedModel | None = None,
    ) -> None:
        self.max_norm = max_norm
        self.tied = dict(tied or {})
        self.pipeline_group = pipeline_group
        self.fresh: dict[str, Tensor] = {}
        """Parameters with elements new since the last growth -> a mask that broadcasts to this rank's shard."""
        self.parameters: dict[str, nn.Parameter] = {}
        for part in parts:
            for name, parameter in part.named_parameters():
                assert name not in self.parameters, f"two parts hold {name}"
                self.parameters[name] = parameter
        self.treatments = {
            name: treatment_of(section, self.tied.get(name, name), parameter.dim(), model)
            for name, parameter in self.parameters.items()
        }
        kind = optimizer_named(section.name)
        self.rules = {
            name: kind.rule_of(self.tied.get(name, name), parameter.dim())
            for name, parameter in self.parameters.items()
        }
        self.inners = [
            rule.make(self._groups(rule, section), section, site or Site(torch.device("cpu")))
            for rule in dict.fromkeys(self.rules.values())
        ]
        self.states: dict[str, dict[str, Tensor]] = {}
        """What is kept of each parameter, by name; the live tensors."""
        inner_of = {each: inner for inner in self.inners for group in inner.param_groups for each in group["params"]}
        for name, parameter in self.parameters.items():
            self.states[name] = {
                kept.name: _zeros(kept, parameter, fused=section.implementation == "fused")
                for kept in self.rules[name].state
            }
            inner_of[parameter].state[parameter] = self.states[name]

    @classmethod
    def of(cls, model: BuiltModel, section: OptimizerConfig, *, max_norm: float) -> Optimizer:
        """The optimizer for a built model."""
        mesh, tied = model.context.mesh, model.context.model_config.tied
        group = mesh.group_of("pp") if mesh.shape.pp > 1 else None
        shard_group = mesh.part_group if needs_group(section) else None
        site = Site(torch.device(model.context.device_type), shard_group)
        sized = SizedModel(model.context.model_config, model.context.family.ROLES)
        return cls(model.parts, section, max_norm=max_norm, site=site, tied=tied, pipeline_group=group, model=sized)

    def _groups(self, rule: UpdateRule, section: OptimizerConfig) -> list[dict[str, Any]]:
        """PyTorch's parameter groups of a rule; only one when the recipe treats all parameters alike."""
        alike: dict[Treatment, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            if self.rules[name] == rule:
                alike.setdefault(self.treatments[name], []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": section.weight_decay * how.weight_decay_factor,
                "lr_factor": how.lr_factor,
                "eps": section.eps * how.eps_factor,
            }
            for how, parameters in alike.items()
        ]

    def named_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, state key, tensor) of all state; the live tensors, to save from or load into."""
        named = dict(self.states)
        for copy, name in self.tied.items():
            if name in self.states and self.pipeline_group is None:
                named.setdefault(copy, self.states[name])
        for name, state in named.items():
            for key, tensor in state.items():
                yield name, key, tensor

    def clip(self) -> Tensor:
        """Clips the gradients to `max_norm`; returns their global norm before clipping, a float32 scalar."""
        counted = []
        for name, parameter in self.parameters.items():
            if self.treatments[name].frozen:
                parameter.grad = None
            if parameter.grad is None:
                continue
            parameter.grad = reduced(parameter.grad, parameter)
            # A copy has the gradient of both; only the original counts.
            if name not in self.tied:
                counted.append(parameter.grad)
        device = next(iter(self.parameters.values())).device
        norm = global_norm(counted, device, self.pipeline_group)
        torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.max_norm, norm, foreach=True)
        return norm

    def step(self, lr: float, fresh_share: float = 1.0) -> None:
        """Updates the parameters and drops the gradients.

        Args:
            fresh_share: fraction of the learning rate for the elements in `fresh`.
        """
        for inner in self.inners:
            for group in inner.param_groups:
                group["lr"] = lr * group["lr_factor"]
        names = self.fresh if fresh_share != 1.0 else ()
        before = {name: local_of(self.parameters[name]).detach().clone() for name in names}
        for inner in self.inners:
            inner.step()
        for name, old in before.items():
            # A step, weight decay included, is linear in the learning rate, so a fraction of the rate is a fraction of
            # the step: old + share * (new - old).
            local = local_of(self.parameters[name]).detach()
            local.copy_(torch.where(self.fresh[name], torch.lerp(old, local, fresh_share), local))
        self.drop()

    def drop(self) -> None:
        """Drops the gradients. Parameters, moments and step counters are unchanged."""
        for parameter in self.parameters.values():
            parameter.grad = None


def _zeros(kept: StateTensor, parameter: Tensor, *, fused: bool) -> Tensor:
    """What a rule keeps of a parameter, at the start."""
    if kept.power is not None:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
    # PyTorch keeps one step counter per tensor; the fused kernels want it on the parameter's device.
    return torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")


def global_norm(
    gradients: Sequence[Tensor], device: torch.device, pipeline_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Euclidean norm of all gradients, over every rank that holds a part of them; a float32 scalar on the device.

    Squares are summed in float64. In float32 the rounding of a large sum depends on the sharding: on the CPU, one rank
    and two differ by 4e-5 (docs/log.md).
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    shards = [local_of(gradient).detach() for gradient in gradients]
    norms = foreach_norm(shards, dtype=torch.float64) if shards else []
    squares = [norm.square() for norm in norms]
    # Tensors sharded over the same axes are summed locally first, then once over those axes.
    by_axes: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for position, gradient in enumerate(gradients):
        if not isinstance(gradient, DTensor):
            total += squares[position]
            continue
        axes = tuple(axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate())
        assert not any(placement.is_partial() for placement in gradient.placements), "a gradient is not reduced yet"
        by_axes.setdefault((gradient.device_mesh, axes), []).append(position)
    for (mesh, axes), positions in by_axes.items():
        part = torch.stack([squares[position] for position in positions]).sum()
        for axis in axes:
            dist.all_reduce(part, group=mesh.get_group(axis))
        total += part
    if pipeline_group is not None:
        dist.all_reduce(total, group=pipeline_group)
    return total.sqrt().float()
