"""Float8: what is converted, what is refused, and that emulation computes what Float8 products compute."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

from titan_growth.config.loader import inspect_recipe
from titan_growth.config.schema.recipe import Recipe
from titan_growth.layout.mesh import Mesh
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.models.registry import family_module, model_config_of
from titan_growth.stages.base import BuildContext
from titan_growth.stages.float8 import Float8, linear_sizes
from titan_growth.tools.findings import Findings

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128, "vocab_size": 272}
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def recipe_of(**values: object) -> Recipe:
    words = ["--model.flavor", "custom", "--model.converters", "quantize.linear.float8"]
    for key, value in {**{f"model.{name}": size for name, size in SIZES.items()}, **values}.items():
        words += [f"--{key.replace('__', '.')}", str(value).lower() if isinstance(value, bool) else str(value)]
    recipe = inspect_recipe(words, found := Findings())
    assert recipe is not None
    assert not found.problems, found.problems
    return recipe


def stage_and_context(device_type: str = "cpu", tp: int = 1, **values: object) -> tuple[Float8, BuildContext]:
    recipe = recipe_of(**values)
    config = model_config_of(recipe.model, Findings())
    assert config is not None
    shape, family = MeshShape(tp=tp), family_module(recipe.model.name)
    mesh = Mesh(shape, device_type)
    return Float8.from_recipe(recipe), BuildContext(config, shape, device_type, 32, family, mesh=mesh)


def converted(stage: Float8, context: BuildContext) -> set[str]:
    with torch.device("meta"):
        model = context.family.Decoder(context.model_config, 32)
    stage.apply([model], context)
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


def test_every_linear_layer_is_converted_and_filtered_ones_are_not() -> None:
    everything = converted(*stage_and_context())
    assert len(everything) == 2 * 7 + 1
    assert "output" in everything
    fewer = converted(*stage_and_context(quantize__linear__float8__filter_fqns="output,attention.wk"))
    assert fewer == everything - {"output", "layers.0.attention.wk", "layers.1.attention.wk"}


def test_a_tied_head_stays() -> None:
    """Its weight is looked up as an embedding too."""
    assert "output" not in converted(*stage_and_context(model__tie_word_embeddings=True))


def test_sizes_that_are_not_multiples_of_16_are_named_once() -> None:
    stage, context = stage_and_context(model__hidden_dim=120, model__vocab_size=258)
    (problem,) = stage.check(context)
    assert problem.key == "model.converters"
    assert "w1 (64 -> 120)" in problem.message
    assert "w2 (120 -> 64)" in problem.message
    assert "output (64 -> 258)" in problem.message
    assert problem.hint == 'Name them in quantize.linear.float8.filter_fqns: ["w1", "w2", "w3", "output"]'


def test_the_sizes_on_a_tensor_parallel_rank_count() -> None:
    assert not list(Float8.check(*stage_and_context()))
    stage, context = stage_and_context(tp=2)
    (problem,) = stage.check(context)
    assert "on each tensor-parallel rank, but the model has output (64 -> 136)" in problem.message
    sizes = {name: (num_out, num_in) for name, num_out, num_in in linear_sizes(context)}
    assert sizes["layers.0.attention.wq"] == (32, 64)
    assert sizes["layers.0.attention.wo"] == (64, 32)
    assert sizes["layers.0.feed_forward.w2"] == (64, 64)


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_of_a_microbatch_are_multiples_of_16_too(name: str) -> None:
    """A weight's gradient is a product over them, unless it stays in high precision."""
    values = {"quantize__linear__float8__recipe_name": name, "training__local_batch_size": 1}
    stage, context = stage_and_context(**values)
    problems = list(stage.check(dataclasses.replace(context, seq_len=1000)))
    assert [problem.key for problem in problems] == ([] if name == "rowwise_with_gw_hp" else ["training.seq_len"])
    assert not list(stage.check(dataclasses.replace(context, seq_len=1008)))


def test_filters_that_match_nothing_are_warned_about() -> None:
    stage, context = stage_and_context(quantize__linear__float8__filter_fqns="ouput,layers.1.attention")
    (warning,) = stage.warnings(context)
    assert warning.message == '"ouput" matches no linear layer'
    assert warning.hint == "Did you mean 'output'?"
    stage, context = stage_and_context(quantize__linear__float8__filter_fqns="auto_filter_small_kn")
    assert "is not supported in this version" in next(iter(stage.check(context))).message


def test_a_filter_on_one_layer_does_not_hide_the_others() -> None:
    values = {"model__hidden_dim": 120, "quantize__linear__float8__filter_fqns": "layers.0"}
    (problem,) = Float8.check(*stage_and_context(**values))
    assert "w1 (64 -> 120)" in problem.message


def test_emulation_is_automatic_and_shown() -> None:
    stage, context = stage_and_context()
    assert stage._emulates(context)
    assert stage.describe(context) == "float8: tensorwise, emulated"
    stage, context = stage_and_context("cuda")  # a plan for GPUs, made without one
    assert not stage._emulates(context)
    assert "emulated" not in stage.describe(context)
    stage, context = stage_and_context("cuda", quantize__linear__float8__emulate=True)
    assert stage._emulates(context)


def test_print_after_conversion(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="titan_growth"):
        converted(*stage_and_context(model__print_after_conversion=True))
    assert "Float8Linear" in caplog.text


@pytest.mark.parametrize("name", RECIPES)
def test_emulation_computes_what_float8_products_compute(name: str) -> None:
    """Values and all gradients; small, because the CPU's Float8 product is a slow reference."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    results = []
    for emulate in (True, False):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(32, 48, bias=False)).bfloat16()
        config = dataclasses.replace(Float8LinearConfig.from_recipe_name(name), emulate=emulate)
        convert_to_float8_training(layer, config=config)
        x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        assert layer[0].weight.grad is not None
        assert x.grad is not None
        results.append([tensor.float() for tensor in (y, x.grad, layer[0].weight.grad)])
    for emulated, real in zip(*results, strict=True):
        assert torch.linalg.norm(emulated - real) <= 1e-2 * torch.linalg.norm(real)
        assert torch.linalg.norm(real) > 0
    # It is Float8: the result differs from the plain product's.
    torch.manual_seed(0)
    plain = nn.Linear(32, 48, bias=False).bfloat16()
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    difference = torch.linalg.norm(plain(x).float() - results[1][0]) / torch.linalg.norm(results[1][0])
    assert 1e-3 < difference < 0.1
