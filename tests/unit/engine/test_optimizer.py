"""Steps against PyTorch's own optimizers, clipping, and state that exists before the first step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.harness import run_ranks
from titan_growth.config.schema.optimizer import OptimizerConfig, ParameterGroupConfig
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.parameter_groups import treatment_of

ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
IMPLEMENTATIONS = ["for-loop", "foreach", "fused"]


def model_with_gradients(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    set_gradients(model, scale, seed=1)
    return model


def set_gradients(model: nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def clip_and_step(optimizer: Optimizer, lr: float) -> torch.Tensor:
    norm = optimizer.clip()
    optimizer.step(lr)
    return norm


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_steps_equal_pytorchs(name: str, implementation: str) -> None:
    """Three steps with changing rates and gradients; no clipping."""
    section = OptimizerConfig(
        name=name, implementation=implementation, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3
    )  # type: ignore[arg-type]
    model = model_with_gradients()
    twin = copy.deepcopy(model)
    optimizer = Optimizer([model], section, max_norm=1e9)
    reference = getattr(torch.optim, name)(twin.parameters(), lr=1.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    for step, lr in enumerate((1e-2, 3e-2, 1e-3)):
        set_gradients(model, 1.0, seed=step)
        set_gradients(twin, 1.0, seed=step)
        clip_and_step(optimizer, lr)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        for key in ADAM_STATE:
            torch.testing.assert_close(optimizer.inners[0].state[parameter][key], reference.state[expected][key])


GROUPS = [
    ParameterGroupConfig(pattern="0.bias", lr_factor=0.5, weight_decay_factor=0.0),
    ParameterGroupConfig(pattern="0.*", lr_factor=2.0),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_are_pytorchs_parameter_groups(implementation: str) -> None:
    """The first pattern that matches counts; what none matches is as without groups."""
    section = OptimizerConfig(implementation=implementation, weight_decay=0.3, groups=GROUPS)  # type: ignore[arg-type]
    model = model_with_gradients()
    twin = copy.deepcopy(model)
    optimizer = Optimizer([model], section, max_norm=1e9)
    groups = [
        {"params": [twin[0].bias], "weight_decay": 0.0, "share": 0.5},
        {"params": [twin[0].weight], "share": 2.0},
        {"params": [twin[1].weight], "share": 1.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.3)
    for step, lr in enumerate((1e-2, 3e-2, 1e-3)):
        set_gradients(model, 1.0, seed=step)
        set_gradients(twin, 1.0, seed=step)
        clip_and_step(optimizer, lr)
        for group in reference.param_groups:
            group["lr"] = lr * group["share"]
        reference.step()
        for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)


def test_decay_on_matrices_only() -> None:
    """A group's own factor counts more."""
    without = OptimizerConfig(weight_decay=0.5, weight_decay_on="matrices")
    shrunk = {}
    for section in (without, without.model_copy(update={"groups": [GROUPS[1]]}), OptimizerConfig(weight_decay=0.5)):
        model = model_with_gradients()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = weights(model)
        clip_and_step(Optimizer([model], section, max_norm=1e9), 0.1)
        moved = [not torch.equal(old, new) for old, new in zip(before, weights(model), strict=True)]
        shrunk[section.weight_decay_on, len(section.groups)] = moved
    assert shrunk == {
        ("matrices", 0): [True, False, True],
        ("matrices", 1): [True, False, True],
        ("all", 0): [True, True, True],
    }
    assert treatment_of(without, "tok_embeddings.weight", 2).weight_decay_factor == 0.0
    assert treatment_of(without, "output.weight", 2).weight_decay_factor == 1.0


def test_frozen_parameters_stay_and_do_not_count_in_the_norm() -> None:
    section = OptimizerConfig(groups=[ParameterGroupConfig(pattern="0.*", frozen=True)])
    model = model_with_gradients()
    before, norm_of_the_rest = weights(model), model[1].weight.grad.norm().item()
    optimizer = Optimizer([model], section, max_norm=1e9)
    assert clip_and_step(optimizer, 0.1).item() == pytest.approx(norm_of_the_rest, rel=1e-6)
    kept = [torch.equal(old, new) for old, new in zip(before, weights(model), strict=True)]
    assert kept == [True, True, False]
    assert all(not tensor.any() for name, _, tensor in optimizer.named_state() if name.startswith("0."))
    everything = OptimizerConfig(groups=[ParameterGroupConfig(pattern="*", frozen=True)])
    model = model_with_gradients()
    assert clip_and_step(Optimizer([model], everything, max_norm=1.0), 0.1).item() == 0.0, (
        "of a part with none to train"
    )


def test_a_tied_copy_is_treated_as_its_original() -> None:
    section = OptimizerConfig(groups=[ParameterGroupConfig(pattern="tok_embeddings.weight", frozen=True)])
    part = nn.ModuleDict({"output": nn.Linear(3, 2, bias=False)})
    tied = {"output.weight": "tok_embeddings.weight"}
    assert Optimizer([part], section, max_norm=1.0, tied=tied).treatments["output.weight"].frozen


def test_adamw_by_hand() -> None:
    """First step: weights shrink by lr * decay, then move by lr against the gradient's sign."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    layer.weight.grad = torch.full((1, 1), 0.25)
    optimizer = Optimizer([layer], OptimizerConfig(weight_decay=0.1, beta1=0.9, beta2=0.95), max_norm=1e9)
    norm = clip_and_step(optimizer, 0.01)
    assert norm.item() == 0.25
    assert layer.weight.item() == pytest.approx(2.0 * (1 - 0.01 * 0.1) - 0.01, rel=1e-6)
    state = {key: value.item() for _, key, value in optimizer.named_state()}
    assert state == {"exp_avg": pytest.approx(0.025), "exp_avg_sq": pytest.approx(0.003125), "step": 1.0}


def test_adam_is_not_adamw() -> None:
    results = []
    for name in ("Adam", "AdamW"):
        model = model_with_gradients()
        clip_and_step(Optimizer([model], OptimizerConfig(name=name, weight_decay=0.5), max_norm=1e9), 0.1)  # type: ignore[arg-type]
        results.append(weights(model))
    assert not any(torch.allclose(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gradients_are_clipped_to_the_global_norm(max_norm: float) -> None:
    model, twin = model_with_gradients(scale=4.0), model_with_gradients(scale=4.0)
    expected_norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()  # type: ignore[union-attr]
    # eps = 1 makes the step proportional to the gradient, so clipping shows in the weights
    section = OptimizerConfig(eps=1.0, weight_decay=0.0)
    norm = clip_and_step(Optimizer([model], section, max_norm=max_norm), 0.1)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    torch.testing.assert_close(norm, expected_norm)
    factor = min(1.0, max_norm / (expected_norm.item() + 1e-6))
    for before, after in zip(twin.parameters(), model.parameters(), strict=True):
        gradient = before.grad * factor  # type: ignore[operator]
        torch.testing.assert_close(after, before - 0.1 * gradient / (gradient.abs() + 1.0), rtol=1e-4, atol=1e-6)


def test_gradients_are_dropped_and_missing_ones_left_alone() -> None:
    model = model_with_gradients()
    model[1].weight.grad = None
    before = weights(model)
    clip_and_step(Optimizer([model], OptimizerConfig(), max_norm=1.0), 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = weights(model)
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_exists_at_once_and_is_live(implementation: str) -> None:
    """A checkpoint is read into it before the first step."""
    model = model_with_gradients()
    optimizer = Optimizer([model], OptimizerConfig(implementation=implementation), max_norm=1e9)  # type: ignore[arg-type]
    state = {(name, key): tensor for name, key, tensor in optimizer.named_state()}
    names = [name for name, _ in model.named_parameters()]
    assert list(state) == [(name, key) for name in names for key in ADAM_STATE]
    assert all(not tensor.any() for tensor in state.values())
    assert all(state[name, "exp_avg"].shape == p.shape for name, p in model.named_parameters())
    twin = copy.deepcopy(model)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        set_gradients(twin, 1.0, seed=step)
        reference.step()
    # as if loaded: copies into the tensors from named_state
    for (name, parameter), trained in zip(model.named_parameters(), twin.parameters(), strict=True):
        parameter.data.copy_(trained.data)
        for key in ADAM_STATE:
            state[name, key].copy_(reference.state[trained][key])
    set_gradients(model, 1.0, seed=9)
    set_gradients(twin, 1.0, seed=9)
    clip_and_step(optimizer, 1e-2)
    reference.step()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)
    assert {tensor.item() for (_, key), tensor in state.items() if key == "step"} == {4.0}


def test_parts_and_tied_weights() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = Optimizer([first, second], OptimizerConfig(), max_norm=1.0)
    assert list(optimizer.parameters) == ["weight", "0.weight"]
    with pytest.raises(AssertionError, match="two parts hold weight"):
        Optimizer([first, nn.Linear(2, 2)], OptimizerConfig(), max_norm=1.0)
    tied = nn.ModuleList([first, first])
    assert len(Optimizer([tied], OptimizerConfig(), max_norm=1.0).parameters) == 1


def _sharded(rank: int) -> tuple[float, list[torch.Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    model = model_with_gradients(scale=4.0)
    for module in model:
        for name, parameter in list(module.named_parameters()):
            gradient = parameter.grad
            sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, (Shard(0),)))
            sharded.grad = distribute_tensor(gradient, mesh, (Shard(0),))
            setattr(module, name, sharded)
    norm = clip_and_step(Optimizer([model], OptimizerConfig(), max_norm=0.5), 0.1)
    return norm.item(), [parameter.full_tensor().detach() for parameter in model.parameters()]  # type: ignore[attr-defined]


def test_the_norm_of_shards_is_that_of_the_whole() -> None:
    """7 and 3 rows over 2 ranks; the same norm and the same weights on both."""
    model = model_with_gradients(scale=4.0)
    norm = clip_and_step(Optimizer([model], OptimizerConfig(), max_norm=0.5), 0.1).item()
    for found, tensors in run_ranks(_sharded, 2):
        assert found == pytest.approx(norm, rel=1e-6)
        for parameter, expected in zip(tensors, model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected.detach(), rtol=1e-6, atol=1e-6)
