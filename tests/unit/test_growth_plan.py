"""Operators, the chain of models, when a growth is due, and the names that a small model is read under."""

from __future__ import annotations

from dataclasses import replace

import pytest
from titan_growth.growth.reader import grown_names, layer_of, with_layer

from titan_growth.checkpoint.lineage import GrowthEvent, Lineage, Progress
from titan_growth.config.growth_schema import Growth
from titan_growth.growth import operators as operators_module
from titan_growth.growth.operators import operators, register_operator
from titan_growth.growth.schedule import plan_growth, timing_problems
from titan_growth.models.config import ModelConfig

TARGET = ModelConfig(
    dim=32, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=61, rope_theta=123.0
)


def growth(*stages: dict[str, object], enable: bool = True) -> Growth:
    return Growth.model_validate({"enable": enable, "stages": [{"factor": 2, **stage} for stage in stages]})


def lineage(num_events: int) -> Lineage:
    event = GrowthEvent(
        step=10, tokens=1, flops=1, operator="stack", factor=2, optimizer_state="reset", lr_policy="restart",
        from_layers=3, to_layers=6, source="step-10", source_of=(0, 1, 2, 0, 1, 2), mesh="1 rank",
        loss_before=2.0, loss_after=3.0,
    )  # fmt: skip
    return Lineage((event,) * num_events)


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "factor", "expected"),
    [(3, 4, (0, 1, 2) * 4), (1, 3, (0, 0, 0)), (5, 2, (0, 1, 2, 3, 4, 0, 1, 2, 3, 4))],
)
def test_stack_repeats_the_whole_list(num_layers: int, factor: int, expected: tuple[int, ...]) -> None:
    """G_stack, not interleaving: 0 1 2 0 1 2 and not 0 0 1 1 2 2."""
    stack = operators()["stack"]
    assert stack.source_of(num_layers, factor) == expected
    grown = stack.grow(replace(TARGET, num_layers=num_layers), factor)
    assert grown == replace(TARGET, num_layers=num_layers * factor), "something but the depth has changed"


def test_an_operator_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators_module, "_OPERATORS", dict(operators_module._OPERATORS))

    @register_operator("mine")
    class Mine:
        def grow(self, config: ModelConfig, factor: int) -> ModelConfig:
            return replace(config, num_layers=config.num_layers * factor)

        def source_of(self, num_layers: int, factor: int) -> tuple[int, ...]:
            return tuple(layer // factor for layer in range(num_layers * factor))

    plan, problems = plan_growth(growth({"at": "1 step", "operator": "mine"}), TARGET)
    assert plan is not None
    assert not problems
    with pytest.raises(AssertionError, match="two operators are called 'mine'"):
        register_operator("mine")(Mine)
    operators().clear()
    assert "mine" in operators(), "callers can change the registry"


# ---- the chain -------------------------------------------------------------------------------------------------------


def test_the_base_is_derived_and_the_chain_ends_at_the_target() -> None:
    plan, problems = plan_growth(growth({"at": "10 steps"}, {"at": "20 steps", "factor": 3}), TARGET)
    assert not problems
    assert plan is not None
    assert [config.num_layers for config in plan.configs] == [2, 4, 12]
    assert plan.config_after(2) == TARGET
    assert plan.config_after(0) == replace(TARGET, num_layers=2)


@pytest.mark.parametrize("section", [growth(), growth({"at": "10 steps", "factor": 5}, enable=False)])
def test_without_growth_the_target_is_trained(section: Growth) -> None:
    plan, problems = plan_growth(section, TARGET)
    assert not problems
    assert plan is not None
    assert plan.configs == (TARGET,)
    assert plan.due(Progress(step=50), Lineage()) is None


def test_factors_that_do_not_divide() -> None:
    _, problems = plan_growth(growth({"at": "10 steps"}, {"at": "20 steps", "factor": 5}), TARGET)
    assert [(p.key, p.message) for p in problems] == [
        ("growth.stages", "the growth factor 2 x 5 = 10 does not divide the target's 12 layers")
    ]
    _, problems = plan_growth(growth({"at": "10 steps", "factor": 24}), TARGET)
    assert problems[0].message == "the growth factor 24 does not divide the target's 12 layers"


def test_unknown_operators_are_all_named() -> None:
    plan, problems = plan_growth(
        growth({"at": "1 step", "operator": "stak"}, {"at": "2 steps", "operator": "x"}), TARGET
    )
    assert plan is None
    assert [(p.key, p.hint) for p in problems] == [
        ("growth.stages.0.operator", "Did you mean 'stack'?"),
        ("growth.stages.1.operator", ""),
    ]
    assert problems[0].message.startswith("unknown operator 'stak'; known: stack")


@pytest.mark.parametrize(
    ("at", "progress", "due"),
    [
        ("10 steps", Progress(step=9, tokens=10**9), False),
        ("10 steps", Progress(step=10), True),
        ("10 steps", Progress(step=11), True),
        ("1k tokens", Progress(step=5000, tokens=999), False),
        ("1k tokens", Progress(step=1, tokens=1000), True),
        ("1k tokens", Progress(step=1, tokens=1007), True),
    ],
)
def test_due_after_the_first_step_that_reaches_the_count(at: str, progress: Progress, due: bool) -> None:
    plan, _ = plan_growth(growth({"at": at}, {"at": "20 steps"}), TARGET)
    assert plan is not None
    assert plan.due(progress, Lineage()) == (plan.stages[0] if due else None)


def test_each_growth_happens_once() -> None:
    plan, _ = plan_growth(growth({"at": "10 steps"}, {"at": "20 steps"}), TARGET)
    assert plan is not None
    assert plan.due(Progress(step=10), lineage(1)) is None
    assert plan.due(Progress(step=20), lineage(1)) is plan.stages[1]
    assert plan.due(Progress(step=99), lineage(2)) is None
    assert [len(plan.remaining(lineage(done))) for done in range(3)] == [2, 1, 0]


@pytest.mark.parametrize(
    ("stages", "keys"),
    [
        ([{"at": "990 tokens"}], []),
        ([{"at": "991 tokens"}], ["growth.stages.0.at"]),
        ([{"at": "5 steps"}, {"at": "50 tokens"}], ["growth.stages.1.at"]),
        ([{"at": "5 steps"}, {"at": "51 tokens"}], []),
        ([{"at": "41 tokens"}, {"at": "5 steps"}], ["growth.stages.1.at"]),
        ([{"at": "2k tokens"}, {"at": "3k tokens"}], ["growth.stages.0.at", "growth.stages.1.at"]),
    ],
)
def test_stages_in_tokens_once_the_batch_is_known(stages: list[dict[str, object]], keys: list[str]) -> None:
    """100 steps of 10 tokens."""
    problems = timing_problems(growth(*stages), steps=100, tokens_per_step=10)
    assert [problem.key for problem in problems] == keys
    assert not timing_problems(growth(*stages, enable=False), steps=100, tokens_per_step=10)


def test_growths_that_have_happened_are_not_asked_about_again() -> None:
    """After 50 steps of 10 tokens the batch shrinks to one token a step: 600 tokens are then 100 steps away."""
    section = growth({"at": "400 tokens"}, {"at": "600 tokens"})
    now = Progress(step=50, tokens=500)
    settings = {"tokens_per_step": 1, "progress": now, "num_growths": 1}
    assert [problem.key for problem in timing_problems(section, steps=150, **settings)] == ["growth.stages.1.at"]
    assert not timing_problems(section, steps=151, **settings)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "served"),
    [
        ("layers.1.attention.wq.weight", ["layers.1.attention.wq.weight", "layers.3.attention.wq.weight"]),
        ("layers.0.ffn_norm.weight", ["layers.0.ffn_norm.weight", "layers.2.ffn_norm.weight"]),
        (
            "optimizer.state.layers.1.ffn_norm.weight.exp_avg",
            ["optimizer.state.layers.1.ffn_norm.weight.exp_avg", "optimizer.state.layers.3.ffn_norm.weight.exp_avg"],
        ),
        ("tok_embeddings.weight", ["tok_embeddings.weight"]),
        ("optimizer.state.output.weight.step", ["optimizer.state.output.weight.step"]),
        ("rng.rank_1.cpu", ["rng.rank_1.cpu"]),
        ("sublayers.1.weight", ["sublayers.1.weight"]),
        ("layers.10.x", []),
    ],
)
def test_served_names(stored: str, served: list[str]) -> None:
    assert grown_names((0, 1, 0, 1))(stored) == served


def test_names_of_layers_with_two_digits() -> None:
    names_of = grown_names(tuple(layer % 12 for layer in range(24)))
    assert names_of("layers.11.x") == ["layers.11.x", "layers.23.x"]
    assert names_of("layers.1.x") == ["layers.1.x", "layers.13.x"]


def test_a_layer_that_no_target_wants_is_served_nowhere() -> None:
    assert grown_names((0, 2, 2))("layers.1.x") == []
    assert grown_names((0, 2, 2))("layers.2.x") == ["layers.1.x", "layers.2.x"]


def test_layer_of_and_with_layer() -> None:
    assert layer_of("optimizer.state.layers.7.attention.wq.weight.step") == 7
    assert layer_of("norm.weight") is None
    assert with_layer("optimizer.state.layers.7.a.layers.3.b", 12) == "optimizer.state.layers.12.a.layers.3.b"
    assert with_layer("norm.weight", 3) == "norm.weight"
