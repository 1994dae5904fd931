"""muP and CompleteP: base sizes from the recipe, the forward pass, initial weights and learning rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from titan_growth.config.schema.model import ModelConfig
from titan_growth.config.schema.optimizer import OptimizerConfig, ParameterGroupConfig
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.parameter_groups import SizedModel, Treatment, treatment_of
from titan_growth.models.config import BaseSizes, DecoderConfig
from titan_growth.models.initialize import init_weights
from titan_growth.models.parametrization import Factors, folded
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.run.check_treatments import check_treatments
from titan_growth.tools.findings import Findings

SIZES = {"flavor": "custom", "dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 160,
         "vocab_size": 67}  # fmt: skip
SEQ_LEN = 12


def config_of(family: str = "llama3", **values: Any) -> DecoderConfig:
    config = model_config_of(ModelConfig(**{"name": family, **SIZES, **values}), found := Findings())
    assert config is not None, found.problems
    return config


def scaled(name: str = "completep", family: str = "llama3", **values: Any) -> DecoderConfig:
    base = {"base_dim": 32, **({"base_n_layers": 2} if name == "completep" else {})}
    return config_of(family, **{"parametrization": name, "mup": base, **values})


def model_of(config: DecoderConfig, family: str = "llama3") -> nn.Module:
    module = family_module(family)
    model: nn.Module = module.Decoder(config, SEQ_LEN)
    model.materialized(torch.device("cpu"))
    init_weights([model], lambda name: module.init_rule(config, name), 0, config.tied)
    return model


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN))


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_open_base_sizes_are_in_the_models_proportions() -> None:
    assert config_of().mup is None
    assert scaled("mup").mup == BaseSizes(dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden_dim=80)
    given = {"base_dim": 16, "base_n_layers": 3, "base_n_heads": 8, "base_n_kv_heads": 8, "base_head_dim": 4,
             "base_hidden_dim": 50}  # fmt: skip
    assert scaled(mup=given).mup == BaseSizes(
        dim=16, num_heads=8, num_kv_heads=8, head_dim=4, hidden_dim=50, num_layers=3
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"parametrization": "mup"}, ["model.mup.base_dim"]),
        ({"parametrization": "completep"}, ["model.mup.base_dim", "model.mup.base_n_layers"]),
        ({"parametrization": "mup", "mup": {"base_dim": 8, "base_n_layers": 2}}, ["model.mup.base_n_layers"]),
        ({"mup": {"base_dim": 8}}, ["model.mup.base_dim"]),
        (
            {"parametrization": "completep", "mup": {"base_dim": 8, "base_n_layers": 2}, "depth_init": True},
            ["model.depth_init"],
        ),
    ],
)
def test_what_is_missing_or_has_no_meaning_is_named(values: dict[str, Any], expected: list[str]) -> None:
    assert model_config_of(ModelConfig(**{**SIZES, **values}), found := Findings()) is None
    assert [problem.key for problem in found.problems] == expected


def test_decay_within_the_gradient_is_refused() -> None:
    section = OptimizerConfig(name="Adam", weight_decay=0.1)
    check_treatments(section, "llama3", config_of(), found := Findings())
    assert found.problems == []
    check_treatments(section, "llama3", scaled(), found)
    assert [problem.key for problem in found.problems] == ["optimizer.name"]
    check_treatments(section.model_copy(update={"weight_decay": 0.0}), "llama3", scaled(), found := Findings())
    assert (found.problems, found.warnings) == ([], [])


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_at_its_base_size_a_model_is_the_standard_one(family: str, tied: bool) -> None:
    """Weights and logits bit for bit; with the depth of the model, not of the layer, in the initial weights."""
    standard = config_of(family, tie_word_embeddings=tied, depth_init=False)
    same = scaled(family=family, tie_word_embeddings=tied, mup={"base_dim": 64, "base_n_layers": 4})
    models = [model_of(config, family) for config in (standard, same)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*(logits_of(model) for model in models))


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("only", ["base_dim", "base_n_layers", "base_head_dim"])
def test_every_factor_is_where_it_can_be_folded(family: str, tied: bool, only: str) -> None:
    """One factor at a time: the standard model with weights times `folded` computes the same, and without it not."""
    base = {"base_dim": 64, "base_n_layers": 4, only: {"base_dim": 16, "base_n_layers": 1, "base_head_dim": 64}[only]}
    config = scaled(family=family, tie_word_embeddings=tied, mup=base)
    assert (
        Factors.of(config)
        == {
            "base_dim": Factors(logits=0.25),
            "base_n_layers": Factors(branches=0.25),
            "base_head_dim": Factors(queries=2.0),
        }[only]
    )
    model = model_of(config, family)
    plain = model_of(replace(config, mup=None), family)
    plain.load_state_dict(model.state_dict())
    assert (logits_of(plain) - logits_of(model)).abs().max() > 1e-4
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.mul_(folded(config, family_module(family).ROLES, name))
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-5, atol=1e-6)


def test_initial_weights() -> None:
    """Hidden matrices by the root of the inputs; depth, embedding and head as at the base."""
    rule = family_module("llama3").init_rule
    base = config_of(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=80, depth_init=False)
    wide = scaled(dim=128, n_layers=8, n_heads=8, n_kv_heads=4, hidden_dim=640,
                  mup={"base_dim": 32, "base_n_layers": 2, "base_hidden_dim": 80})  # fmt: skip
    found = {}
    for name in ("attention.wq", "attention.wo", "feed_forward.w2", "feed_forward.w3"):
        found[name] = rule(wide, f"layers.1.{name}.weight").std / rule(base, f"layers.1.{name}.weight").std
        assert rule(wide, f"layers.7.{name}.weight") == rule(wide, f"layers.0.{name}.weight")
    assert found == pytest.approx(
        {"attention.wq": 0.5, "attention.wo": 0.5, "feed_forward.w2": 8**-0.5, "feed_forward.w3": 0.5}
    )
    for name in ("tok_embeddings.weight", "output.weight", "norm.weight"):
        assert rule(wide, name) == rule(base, name)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "wide", "deep"),
    [
        ("AdamW", {}, 1 / 4, 1 / 8),
        ("Muon", {}, 1 / 2, 8**-0.5),  # w2 is 128 x 640 and its base 32 x 80
        ("Muon", {"adjust_lr_fn": "original"}, 1.0, 1.0),
    ],
)
def test_learning_rates(name: str, options: dict[str, Any], wide: float, deep: float) -> None:
    """Of hidden matrices alone; decay the other way round; eps of everything."""
    config = scaled(dim=128, n_layers=8, n_heads=8, n_kv_heads=4, hidden_dim=640,
                    mup={"base_dim": 32, "base_n_layers": 2, "base_hidden_dim": 80})  # fmt: skip
    model = SizedModel(config, family_module("llama3").ROLES)
    section = OptimizerConfig(name=name, options=options)

    def how(parameter: str, num_dims: int = 2) -> Treatment:
        return treatment_of(section, parameter, num_dims, model)

    assert how("layers.3.attention.wq.weight") == Treatment(wide, 1 / wide, eps_factor=1 / 16)
    if name == "Muon" and not options:
        # Not in the base's proportions: the spectral norm follows sqrt(outputs / inputs).
        deep *= (128 / 640 / (32 / 80)) ** 0.5
    if options:
        deep = (128 / 640 / (32 / 80)) ** 0.5
    assert how("layers.3.feed_forward.w2.weight").lr_factor == pytest.approx(deep)
    assert how("layers.3.attention_norm.weight", 1) == Treatment(eps_factor=1 / 16)
    for outside in ("tok_embeddings.weight", "output.weight"):
        assert how(outside) == Treatment(eps_factor=1 / 4)


def test_groups_multiply() -> None:
    groups = [
        ParameterGroupConfig(pattern="layers.0.*", lr_factor=0.5, weight_decay_factor=3.0),
        ParameterGroupConfig(pattern="layers.1.*", frozen=True),
    ]
    section, model = OptimizerConfig(groups=groups), SizedModel(scaled("mup"), family_module("llama3").ROLES)
    name = "attention.wq.weight"
    assert treatment_of(section, f"layers.0.{name}", 2, model) == Treatment(0.25, 6.0, eps_factor=0.5)
    assert treatment_of(section, f"layers.1.{name}", 2, model).frozen
    assert treatment_of(section, f"layers.1.{name}", 2, model).lr_factor == 0
    assert treatment_of(section, f"layers.2.{name}", 2, model) == Treatment(0.5, 2.0, eps_factor=0.5)


def test_the_optimizer_gets_them() -> None:
    config = scaled("mup")
    model, section = model_of(config), OptimizerConfig(eps=1e-6, weight_decay=0.3)
    sized = SizedModel(config, family_module("llama3").ROLES)
    (inner,) = Optimizer([model], section, max_norm=1.0, model=sized).inners
    of = {parameter: group for group in inner.param_groups for parameter in group["params"]}
    hidden, head = of[model.layers["0"].attention.wq.weight], of[model.output.weight]
    assert (hidden["lr_factor"], hidden["weight_decay"], hidden["eps"]) == (0.5, 0.6, 5e-7)
    assert (head["lr_factor"], head["weight_decay"], head["eps"]) == (1.0, 0.3, 5e-7)
