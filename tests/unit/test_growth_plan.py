"""Operators, the chain of models, when a growth is due, and the names that a small model is read under."""

from __future__ import annotations

from dataclasses import replace

import pytest

from titan_growth.checkpoint.lineage import GrowthEvent, Lineage, Progress
from titan_growth.config.growth_schema import Growth, GrowthStage
from titan_growth.growth import operators as operators_module
from titan_growth.growth.operators import GrowthMap, operators, register_operator
from titan_growth.growth.schedule import plan_growth, timing_problems
from titan_growth.models.config import ModelConfig

TARGET = ModelConfig(
    dim=32, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=61, rope_theta=123.0
)


def growth(*stages: dict[str, object], enable: bool = True) -> Growth:
    return Growth.model_validate({"enable": enable, "stages": [{"factor": 2, **stage} for stage in stages]})


def lineage(num_events: int) -> Lineage:
    event = GrowthEvent(
        step=10, tokens=1, flops=1, operator="stack", stage={}, from_sizes={"n_layers": 3}, to_sizes={"n_layers": 6},
        layer_map=(0, 1, 2, 0, 1, 2), source="step-10", mesh="1 rank", num_ranks=1, loss_before=2.0,
    )  # fmt: skip
    return Lineage((event,) * num_events)


# ---- operators -------------------------------------------------------------------------------------------------------


def test_a_plugins_operator_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators_module, "_OPERATORS", dict(operators()))

    @register_operator("mine")
    class Mine:
        grows = frozenset({"depth"})
        options = frozenset({"upside_down"})

        def base(self, after: ModelConfig, stage: GrowthStage) -> ModelConfig | str:
            return replace(after, num_layers=after.num_layers // 2)

        def grow(self, before: ModelConfig, stage: GrowthStage) -> GrowthMap | str:
            layers = [layer // 2 for layer in range(2 * before.num_layers)]
            order = layers[::-1] if stage.options.get("upside_down") else layers
            return GrowthMap(before=before, after=replace(before, num_layers=len(order)), layers=tuple(order))

    plan, problems = plan_growth(growth({"at": "1 step", "operator": "mine", "options": {"upside_down": True}}), TARGET)
    assert plan is not None
    assert not problems
    assert plan.map_after(0).layers == (5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0)
    _, problems = plan_growth(growth({"at": "1 step", "operator": "mine", "options": {"upsidedown": 1}}), TARGET)
    assert [(p.key, p.hint) for p in problems] == [
        ("growth.stages.0.options.upsidedown", "Did you mean 'upside_down'?")
    ]
    with pytest.raises(AssertionError, match="two operators are called 'mine'"):
        register_operator("mine")(type("Other", (Mine,), {}))
    with pytest.raises(AssertionError, match="'other' lacks grow, grows"):
        register_operator("other")(type("Other", (), {"base": None}))
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
        ("growth.stages.1.factor", "the factor 5 does not divide 12 layers (the factors are 2 x 5)")
    ]
    _, problems = plan_growth(growth({"at": "10 steps", "factor": 24}), TARGET)
    assert problems[0].message == "the factor 24 does not divide 12 layers"


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
