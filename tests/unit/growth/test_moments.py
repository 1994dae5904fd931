"""What becomes of Adam's state: every policy, over depth and width, and the overshoot that must not happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.unit.growth.test_function import CONFIGS, logits_of, model_of, state_of
from titan_growth.checkpoint.reader import SafeReader
from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.growth.apply import fresh_elements
from titan_growth.growth.operators.base import GrowthMap, operators
from titan_growth.growth.read import read_grown
from titan_growth.growth.rules import Rules
from titan_growth.growth.verify import verify_growth
from titan_growth.models.registry import family_module
from titan_growth.models.roles import OPTIMIZER_PREFIX

FAMILY, CONFIG = CONFIGS["llama3"]
ROLES = family_module(FAMILY).ROLES
DOUBLE = {"factor": 2}


def moments_of(names: Any, shapes: Any, second: float | None = None) -> dict[str, Tensor]:
    """Random moments of old age; second moments of one value, if it is given."""
    state = {}
    for name, shape in zip(names, shapes, strict=True):
        state[f"{OPTIMIZER_PREFIX}{name}.exp_avg"] = torch.randn(shape)
        state[f"{OPTIMIZER_PREFIX}{name}.exp_avg_sq"] = (
            torch.rand(shape) + 0.1 if second is None else torch.full(shape, second)
        )
        state[f"{OPTIMIZER_PREFIX}{name}.step"] = torch.tensor(900.0)
    return state


def grown_state(
    folder: Path, second: float | None = None, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], GrowthMap]:
    """(the small model's tensors, the grown one's with its moments, the map)."""
    torch.manual_seed(0)
    stage = PlannedGrowth.model_validate({"at": "1 step", **settings})
    growth = operators()[stage.operator].grow(CONFIG, stage)
    assert isinstance(growth, GrowthMap), growth
    small = state_of(model_of(FAMILY, CONFIG, seed=3))
    small |= moments_of(list(small), [tensor.shape for tensor in small.values()], second)
    dcp.save(small, checkpoint_id=folder, no_dist=True)
    large = state_of(model_of(FAMILY, growth.after))
    large |= moments_of(list(large), [tensor.shape for tensor in large.values()])
    rules = Rules(growth, stage, family_module(FAMILY))
    read_grown(SafeReader(folder), large, rules, seed=1)
    assert verify_growth(SafeReader(folder), large, rules) == []
    return small, large, growth


def state(tensors: dict[str, Tensor], name: str, key: str) -> Tensor:
    return tensors[f"{OPTIMIZER_PREFIX}{name}.{key}"]


@pytest.mark.parametrize("step", ["keep", "reset"])
def test_copies_over_depth(step: str, tmp_path: Path) -> None:
    small, large, _ = grown_state(tmp_path, operator="stack", **DOUBLE, optimizer_state="copy", optimizer_step=step)
    for layer in range(6):
        for key in ("exp_avg", "exp_avg_sq"):
            name = "attention.wq.weight"
            assert torch.equal(
                state(large, f"layers.{layer}.{name}", key), state(small, f"layers.{layer % 3}.{name}", key)
            )
        assert state(large, f"layers.{layer}.ffn_norm.weight", "step") == (900 if step == "keep" else 0)


def test_asymmetric_over_depth_keeps_the_originals(tmp_path: Path) -> None:
    """[S, 0]: the first copy of a layer keeps its moments, the others start anew, counter included."""
    small, large, _ = grown_state(tmp_path, operator="interpose", **DOUBLE, optimizer_state="asymmetric")
    for layer in range(6):
        name = f"layers.{layer}.feed_forward.w1.weight"
        source = f"layers.{layer // 2}.feed_forward.w1.weight"
        for key in ("exp_avg", "exp_avg_sq"):
            expected = state(small, source, key) if layer % 2 == 0 else torch.zeros(80, 48)
            assert torch.equal(state(large, name, key), expected)
        assert state(large, name, "step") == (900 if layer % 2 == 0 else 0)
    assert state(large, "output.weight", "step") == 900


def test_silent_copies_start_their_writing_projections_anew(tmp_path: Path) -> None:
    _, large, _ = grown_state(tmp_path, operator="zero_depth", **DOUBLE, optimizer_state="copy")
    assert not state(large, "layers.1.attention.wo.weight", "exp_avg").any()
    assert state(large, "layers.1.attention.wo.weight", "step") == 0
    assert state(large, "layers.1.attention.wq.weight", "exp_avg").any()
    assert state(large, "layers.1.attention.wq.weight", "step") == 900


@pytest.mark.parametrize("tied", [False, True])
def test_copy_scaled_is_how_gradients_really_scale(tied: bool, tmp_path: Path) -> None:
    """Gradients of the small model in the place of moments must become those of the grown one, which are measured."""
    family, config = CONFIGS["llama3 tied" if tied else "llama3"]
    stage = PlannedGrowth.model_validate(
        {"at": "1 step", "operator": "split_width", **DOUBLE, "optimizer_state": "copy_scaled"}
    )
    growth = operators()["split_width"].grow(config, stage)
    assert isinstance(growth, GrowthMap)
    small, large = model_of(family, config, seed=3), model_of(family, growth.after)
    rules = Rules(growth, stage, family_module(family))
    tokens = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(1))
    small(tokens, None, tokens).sum().backward()
    stored = state_of(small)
    for name, parameter in small.state_dict(keep_vars=True).items():
        assert parameter.grad is not None
        stored[f"{OPTIMIZER_PREFIX}{name}.exp_avg"] = parameter.grad
        stored[f"{OPTIMIZER_PREFIX}{name}.exp_avg_sq"] = parameter.grad**2
    dcp.save(stored, checkpoint_id=tmp_path, no_dist=True)
    read_grown(SafeReader(tmp_path), state_of(large), rules, seed=1)
    large(tokens, None, tokens).sum().backward()
    assert torch.allclose(logits_of(small), logits_of(large), rtol=1e-5, atol=1e-5)
    for name, parameter in large.named_parameters():
        assert parameter.grad is not None
        for power, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
            scaled = {f"{OPTIMIZER_PREFIX}{name}.{key}": torch.empty_like(parameter)}
            read_grown(SafeReader(tmp_path), scaled, rules, seed=1)
            (found,) = scaled.values()
            difference = (found - parameter.grad**power).norm() / (parameter.grad**power).norm()
            assert difference < 1e-5, f"{name}.{key} is off by {difference:.1e}"


@pytest.mark.parametrize("operator", ["split_width", "zero_width"])
def test_asymmetric_over_width_seeds_second_moments(operator: str, tmp_path: Path) -> None:
    """First moments of what is new are zero; second ones are borrowed, since the tensor's counter is old."""
    small, large, growth = grown_state(tmp_path, operator=operator, **DOUBLE, optimizer_state="asymmetric")
    name = "layers.1.feed_forward.w1.weight"
    first = state(large, name, "exp_avg")
    assert not first[80:].any()
    assert not first[:, 48:].any()
    factor = 0.5 if operator == "split_width" else 1.0
    assert torch.allclose(first[:80, :48], factor * state(small, name, "exp_avg"))
    assert (state(large, name, "exp_avg_sq") > 0).all()
    assert state(large, name, "step") == 900
    assert growth.after.dim == 96


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_no_update_overshoots(beta2: float, tmp_path: Path) -> None:
    """Real Adam, constant gradients, kept counter: with a zero second moment the new elements would overshoot."""
    _, large, _ = grown_state(tmp_path, 0.55, operator="zero_width", **DOUBLE, optimizer_state="asymmetric")
    name = "layers.1.feed_forward.w1.weight"

    def largest_update(second: Tensor) -> float:
        weight = torch.nn.Parameter(large[name].clone())
        adam = torch.optim.Adam([weight], lr=1.0, betas=(0.9, beta2))
        first, step = state(large, name, "exp_avg").clone(), torch.tensor(5000.0)
        adam.state[weight] = {"step": step, "exp_avg": first, "exp_avg_sq": second.clone()}
        most = 0.0
        for _ in range(60):
            before = weight.detach().clone()
            weight.grad = torch.full_like(weight, 0.55**0.5)  # what the second moments are a mean of
            adam.step()
            most = max(most, float((weight.detach() - before)[80:, 48:].abs().max()))
        return most

    seeded = state(large, name, "exp_avg_sq")
    zeroed = seeded.clone()
    zeroed[80:] = 0
    zeroed[:, 48:] = 0
    assert largest_update(seeded) <= 1.001, "more than the learning rate"
    known = {0.95: 1.10, 0.99: 2.13, 0.999: 6.6}[beta2]
    assert largest_update(zeroed) == pytest.approx(known, rel=0.02), "the overshoot that is prevented"


def test_what_is_fresh_is_what_is_not_original(tmp_path: Path) -> None:
    """The masks of `rewarm_new`, for depth and for width."""
    for settings, expected in (
        ({"operator": "stack", **DOUBLE}, {"layers.0": 0.0, "layers.3": 1.0, "output": 0.0}),
        ({"operator": "split_width", **DOUBLE}, {"layers.0": 0.75, "output": 0.5, "norm": 0.5}),
        ({"operator": "zero_width", **DOUBLE}, {"layers.0": 0.75, "output": 0.5, "norm": 0.5}),
    ):
        stage = PlannedGrowth.model_validate({"at": "1 step", **settings})
        growth = operators()[stage.operator].grow(CONFIG, stage)
        assert isinstance(growth, GrowthMap)
        tensors = state_of(model_of(FAMILY, growth.after))
        masks = fresh_elements(tensors, growth, stage, family=FAMILY)
        for start, share in expected.items():
            name = f"{start}.feed_forward.w1.weight" if start.startswith("layers") else f"{start}.weight"
            found = masks[name].expand_as(tensors[name]).float().mean() if name in masks else 0.0
            assert float(found) == pytest.approx(share), f"{settings}: {name}"
