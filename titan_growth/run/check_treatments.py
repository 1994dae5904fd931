"""Does `[optimizer]` fit the model: its parameter groups, and muP's or CompleteP's learning rates?"""

from __future__ import annotations

from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.engine.parameter_groups import SizedModel, group_of, treatments, unmatched
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.layout.shards import ModelShards
from titan_growth.models.config import DecoderConfig
from titan_growth.models.registry import family_module
from titan_growth.optimizers.base import optimizers
from titan_growth.tools.findings import Findings


def check_treatments(section: OptimizerConfig, family: str, target: DecoderConfig, found: Findings) -> None:
    """Reports groups without parameters, and optimizers that do not go with the model's parametrisation."""
    _check_groups(section, family, target, found)
    _check_qk_clip(section, family, target, found)
    if target.mup is not None and section.name in optimizers():
        _check_parametrization(section, found)


def _check_groups(section: OptimizerConfig, family: str, target: DecoderConfig, found: Findings) -> None:
    """Every parameter group has parameters, and something is left to train."""
    if not section.groups:
        return
    parameters = list(ModelShards(target, family_module(family), MeshShape()).parameters())
    for number in unmatched(section, (parameter.name for parameter in parameters)):
        pattern = section.groups[number].pattern
        message = f"no parameter of the model is called '{pattern}', or an earlier group has all that are"
        hint = f"Names are like {parameters[0].name} and {parameters[len(parameters) // 2].name}"
        found.problem(f"optimizer.groups.{number}.pattern", message, hint)
    model = SizedModel(target, family_module(family).ROLES)
    if all(how.lr_factor == 0 for how in treatments(section, parameters, model)):
        found.problem("optimizer.groups", "freezes every parameter", "Leave some to train")


def _check_qk_clip(section: OptimizerConfig, family: str, target: DecoderConfig, found: Findings) -> None:
    """QK-clip changes weights, so none of them may be frozen."""
    if section.qk_clip == 0:
        return
    for parameter in ModelShards(target, family_module(family), MeshShape()).parameters():
        if parameter.name.endswith((".wq.weight", ".wk.weight")):
            group = group_of(section, parameter.name)
            if group is not None and group.frozen:
                message = f"would scale {parameter.name}, which the group '{group.pattern}' freezes"
                found.problem("optimizer.qk_clip", message, "Set it to 0, or leave wq and wk out of the group")
                return


def _check_parametrization(section: OptimizerConfig, found: Findings) -> None:
    """Under muP and CompleteP the optimizer must be one whose step is known to scale."""
    if section.name == "Adam" and section.weight_decay > 0:
        message = "weight decay that is part of the gradient transfers to no other size"
        found.problem("optimizer.name", message, 'Set it to "AdamW", or optimizer.weight_decay = 0')
    for rule in optimizers()[section.name].rules:
        if not hasattr(rule, "width_factor"):
            message = f"{rule.name} does not say how its learning rate depends on the width: Adam's 1 / width is taken"
            found.warn("optimizer.name", message)
