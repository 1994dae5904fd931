"""What every operator does to the function that a model computes, measured on logits in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.multipliers import is_exact
from titan_growth.growth.operators.base import GrowthMap, operators
from titan_growth.growth.read import read_grown
from titan_growth.growth.rules import Rules
from titan_growth.growth.verify import verify_growth
from titan_growth.layout.mesh import Mesh
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.models.config import BaseSizes, DecoderConfig
from titan_growth.models.initial_values import InitScheme
from titan_growth.models.initialize import init_weights
from titan_growth.models.parametrization import Factors
from titan_growth.models.registry import family_module
from titan_growth.models.roles import layer_of, with_layer
from titan_growth.stages.base import BuildContext, Transition
from titan_growth.stages.growth_mask import GrowthMask

SIZES = {"dim": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "hidden_dim": 80}
CONFIGS = {
    "llama3": ("llama3", DecoderConfig(vocab_size=131, **SIZES)),
    "llama3 tied": ("llama3", DecoderConfig(vocab_size=131, tie_word_embeddings=True, **SIZES)),
    "qwen3": ("qwen3", DecoderConfig(vocab_size=131, qk_norm=True, **SIZES)),
    "qwen3 tied": ("qwen3", DecoderConfig(vocab_size=131, qk_norm=True, tie_word_embeddings=True, **SIZES)),
}
BASE = BaseSizes(dim=24, num_heads=3, num_kv_heads=1, head_dim=4, hidden_dim=40, num_layers=2)
SCALED = {
    f"{name} completep": (family, replace(config, mup=BASE, init=InitScheme(readers_std=0.2, writers_std=0.2)))
    for name, (family, config) in CONFIGS.items()
}
"""All factors of the forward pass are other than 1 and change with the size. Branches add something all the same."""
SEQ_LEN = 40


def model_of(family: str, config: DecoderConfig, seed: int | None = None) -> nn.Module:
    """A model; with a seed, one whose weights are nothing special: norms off 1, and no layer like another."""
    module = family_module(family)
    model: nn.Module = module.Decoder(config, SEQ_LEN)
    model.materialized(torch.device("cpu"))
    if seed is not None:
        init_weights([model], lambda name: module.init_rule(config, name), seed, config.tied)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.3 * noise).add_(0.05 * noise)
    return model


def logits_of(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 131, (2, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(tokens)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def grown(folder: Path, case: str, **settings: Any) -> tuple[nn.Module, nn.Module, GrowthMap]:
    """(the small model, the grown one, the map between them); the growth is verified as a run verifies it."""
    family, config = (CONFIGS | SCALED)[case]
    module = family_module(family)
    stage = PlannedGrowth.model_validate({"at": "1 step", **settings})
    growth = operators()[stage.operator].grow(config, stage)
    assert isinstance(growth, GrowthMap), growth
    small, large = model_of(family, config, seed=3), model_of(family, growth.after)
    dcp.save(state_of(small), checkpoint_id=folder, no_dist=True)
    rules = Rules(growth, stage, module)
    read_grown(SafeReader(folder), state_of(large), rules, seed=11)
    wrong = verify_growth(SafeReader(folder), state_of(large), rules)
    assert wrong == []
    return small, large, growth


DOUBLE = {"dim": 96, "n_heads": 12, "n_kv_heads": 4, "hidden_dim": 160}
UNEVEN = {"dim": 72, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 100}
ONLY_HIDDEN = {"hidden_dim": 100}
MORE_QUERIES = {"n_heads": 10}


def masked(model: nn.Module, case: str, growth: GrowthMap, step: int) -> nn.Module:
    """The model under the mask of a growth at step 100 that opens over 10 steps, as it is at a step."""
    stage, context = GrowthMask(), mask_context(case, growth, step)
    assert stage.enabled(context)
    stage.apply([model], context)
    stage.before_step([model], context)
    return model


def mask_context(case: str, growth: GrowthMap, step: int) -> BuildContext:
    """The context of such a step."""
    family, _ = (CONFIGS | SCALED)[case]
    transition = Transition(growth, 10, 100)
    return BuildContext(
        growth.after,
        MeshShape(),
        "cpu",
        SEQ_LEN,
        family_module(family),
        transition,
        mesh=Mesh(MeshShape(), "cpu"),
        step=step,
    )


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("sizes", [{"factor": 2}, {"n_layers": 4}])
def test_random_depth_is_exact_while_its_mask_is_closed(case: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    small, large, growth = grown(tmp_path, case, operator="random_depth", mask_steps=10, **sizes)
    assert growth.tolerance == 0.0
    unmasked = logits_of(large)
    assert torch.equal(logits_of(small), logits_of(masked(large, case, growth, 100)))
    distances = []
    for step in (101, 105, 110, 111):
        GrowthMask().before_step([large], mask_context(case, growth, step))
        distances.append(float((logits_of(large) - unmasked).norm()))
    assert distances[0] > distances[1] > distances[2] == distances[3] == 0.0, "an open mask is no mask"


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("sizes", [{"factor": 2}, {"factor": 3}, DOUBLE, UNEVEN, ONLY_HIDDEN, MORE_QUERIES])
def test_random_width_preserves_while_its_mask_is_closed(case: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    small, large, growth = grown(tmp_path, case, operator="random_width", mask_steps=10, **sizes)
    unmasked = logits_of(large)
    assert deviation(small, large) > 1e-4, "everything new is random"
    masked(large, case, growth, 100)
    assert deviation(small, large) < 1e-6
    masked(large, case, growth, 110)
    assert torch.equal(logits_of(large), unmasked)


def deviation(small: nn.Module, large: nn.Module) -> float:
    """Relative difference of the logits, in the Euclidean norm."""
    expected, found = logits_of(small), logits_of(large)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("sizes", [{"factor": 2}, {"operator": "map", "layer_map": [0, 2, 2, 1, 0]}])
def test_copies_write_as_layers_of_a_deeper_model_start(case: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """`rescale_to_depth`: wo and w2 of copies times sqrt(l / L); all else, and the first of each layer, stay."""
    small, large, growth = grown(tmp_path, case, rescale_to_depth=True, **sizes)
    before, after = state_of(small), state_of(large)
    factor = (growth.before.num_layers / growth.after.num_layers) ** 0.5
    copies = []
    for name, tensor in after.items():
        layer = layer_of(name)
        source = before[name if layer is None else with_layer(name, growth.layers[layer])]
        writes = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
        if writes and layer is not None and growth.layers[layer] in growth.layers[:layer]:
            copies.append(layer)
            assert not torch.equal(tensor, source)
            source = source * factor
        torch.testing.assert_close(tensor, source, rtol=1e-6, atol=0)
    assert len(copies) == 2 * (growth.after.num_layers - len(set(growth.layers)))


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("sizes", [{"factor": 2}, {"n_layers": 4}, {"layer_map": [0, 0, 0, 1, 2, 2]}])
def test_zero_depth_is_exact(case: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Not close: the same bits."""
    small, large, growth = grown(tmp_path, case, operator="zero_depth", noise=0.5, **sizes)
    assert growth.tolerance == 0.0
    assert torch.equal(logits_of(small), logits_of(large))
    assert len(large.layers) > len(small.layers)


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("sizes", [{"factor": 2}, {"factor": 3}, DOUBLE, UNEVEN, ONLY_HIDDEN, MORE_QUERIES])
def test_zero_width_preserves(case: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Norms and their eps are rescaled: without the one tens of percent would be missing, without the other 1e-4."""
    small, large, growth = grown(tmp_path, case, operator="zero_width", **sizes)
    assert growth.tolerance == 1e-6
    assert growth.after.norm_eps == pytest.approx(growth.before.norm_eps * growth.before.dim / growth.after.dim)
    assert deviation(small, large) < 1e-6


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("sizes", [{"factor": 2}, {"factor": 3}, DOUBLE, ONLY_HIDDEN, MORE_QUERIES])
def test_uniform_split_width_preserves(case: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Whole multiples of dim; heads and SwiGLU channels may be copied unevenly."""
    small, large, growth = grown(tmp_path, case, operator="split_width", **sizes)
    assert growth.tolerance == 1e-6
    assert growth.after.norm_eps == growth.before.norm_eps
    assert deviation(small, large) < 1e-6


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        ({"operator": "stack", "factor": 2}, 0.1, 2.0),
        ({"operator": "interpose", "factor": 2}, 0.1, 2.0),
        ({"operator": "middle", "n_layers": 4}, 0.05, 2.0),
        ({"operator": "map", "layer_map": [0, 1, 2, 1, 2]}, 0.05, 2.0),
        ({"operator": "split_width", **UNEVEN}, 1e-3, 1.0),
        ({"operator": "split_width", "factor": 2, "noise": 0.05}, 1e-4, 0.5),
    ],
)
def test_the_others_do_not_and_say_so(
    case: str, settings: dict[str, Any], least: float, most: float, tmp_path: Path
) -> None:
    """Their deviation is within what is known of them, and no tolerance is declared (noise is the chain's business)."""
    small, large, growth = grown(tmp_path, case, **settings)
    assert growth.tolerance is None or "noise" in settings
    assert least < deviation(small, large) < most


@pytest.mark.parametrize("operator", ["split_width", "zero_width"])
def test_everything_new_learns(operator: str, tmp_path: Path) -> None:
    """No parameter of the grown model is without a gradient, as new SwiGLU channels are in other implementations."""
    _, large, _ = grown(tmp_path, "llama3", operator=operator, **ONLY_HIDDEN, dim=72, n_heads=9, n_kv_heads=3)
    tokens = torch.randint(0, 131, (2, SEQ_LEN))
    large(tokens, None, tokens).sum().backward()
    learning = {name: parameter.grad.abs().sum(dim=-1) > 0 for name, parameter in large.named_parameters()}
    for name in ("layers.1.feed_forward.w2.weight", "layers.1.attention.wo.weight"):
        assert learning[name].all(), f"{name}: rows of new channels get no gradient"
    read = {name: parameter.grad.abs().sum(dim=0) > 0 for name, parameter in large.named_parameters()}
    for name in ("layers.1.feed_forward.w2.weight", "layers.1.attention.wo.weight"):
        assert read[name].all(), f"{name}: what new channels add gets no gradient"


# ---- factors of muP and CompleteP that change with the size ----------------------------------------------------------


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize(
    "settings",
    [
        {"operator": "zero_depth", "factor": 2},
        {"operator": "zero_depth", "n_layers": 4},
        {"operator": "random_depth", "factor": 2, "mask_steps": 10},
        {"operator": "zero_width", "factor": 2},
        {"operator": "zero_width", **UNEVEN},
        {"operator": "random_width", "factor": 2, "mask_steps": 10},
        {"operator": "split_width", "factor": 2},
        {"operator": "split_width", "factor": 3},
    ],
)
def test_factors_that_change_are_taken_by_weights(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The function is preserved although the factors change; without `carried` it would not be."""
    small, large, growth = grown(tmp_path, case, **settings)
    assert Factors.of(growth.before) != Factors.of(growth.after)
    if growth.masked:
        masked(large, case, growth, 100)
    assert deviation(small, large) < (1e-6 if is_exact(growth) else 2e-6)
    if growth.tolerance == 0.0 and is_exact(growth):
        assert torch.equal(logits_of(small), logits_of(large))
    plain = family_module(SCALED[case][0]).Decoder(replace(growth.after, mup=None), SEQ_LEN)
    plain.materialized(torch.device("cpu"))
    plain.load_state_dict(large.state_dict(), strict=False)
    assert deviation(small, plain) > 1e-2, "the factors do not matter here"


@pytest.mark.parametrize("case", ["llama3", "qwen3"])
def test_copies_share_what_their_layer_added(case: str, tmp_path: Path) -> None:
    """Under CompleteP, G_stack and interposition copy weights unchanged; they change the function less."""
    changes = {}
    for kind in (case, f"{case} completep"):
        for operator in ("stack", "interpose"):
            small, large, growth = grown(tmp_path / kind / operator, kind, operator=operator, factor=2)
            before, after = state_of(small), state_of(large)
            assert all(torch.equal(after[f"layers.{layer}.attention.wo.weight"],
                                   before[f"layers.{source}.attention.wo.weight"])
                       for layer, source in enumerate(growth.layers))  # fmt: skip
            changes[kind, operator] = deviation(small, large)
    for operator in ("stack", "interpose"):
        assert changes[f"{case} completep", operator] < changes[case, operator]


def test_uneven_copies_add_as_much_as_their_source(tmp_path: Path) -> None:
    """3 -> 4 layers: the factor of all branches falls by 3 / 4; one layer is there twice, the others once."""
    small, large, _ = grown(tmp_path, "llama3 completep", operator="map", layer_map=[0, 1, 1, 2])
    before, after = state_of(small), state_of(large)
    for layer, source, factor in ((0, 0, 4 / 3), (1, 1, 2 / 3), (2, 1, 2 / 3), (3, 2, 4 / 3)):
        for name in ("attention.wo.weight", "feed_forward.w2.weight"):
            expected = before[f"layers.{source}.{name}"] * factor
            torch.testing.assert_close(after[f"layers.{layer}.{name}"], expected)


def test_moments_follow_the_factors() -> None:
    """A parameter times s under a factor of 1 / s has a gradient of 1 / s."""
    family, config = SCALED["llama3 completep"]
    stage = PlannedGrowth.model_validate(
        {"at": "1 step", "operator": "zero_depth", "factor": 2, "optimizer_state": "copy_scaled"}
    )
    growth = operators()["zero_depth"].grow(config, stage)
    assert isinstance(growth, GrowthMap)
    rules = Rules(growth, stage, family_module(family))
    name = "layers.0.attention.wo.weight"
    assert rules.of(name).scale == 2.0
    assert rules.of(f"optimizer.state.{name}.exp_avg").scale == 0.5
    assert rules.of(f"optimizer.state.{name}.exp_avg_sq").scale == 0.25
    assert rules.of("optimizer.state.layers.0.attention.wq.weight.exp_avg").scale == 1.0
    copied = stage.model_copy(update={"optimizer_state": "copy"})
    assert Rules(growth, copied, family_module(family)).of(f"optimizer.state.{name}.exp_avg").scale == 1.0
