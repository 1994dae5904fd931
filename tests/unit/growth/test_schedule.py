"""Operators, the chain of models, when a growth is due, and the names that a small model is read under."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from titan_growth.checkpoint.history import GrowthEvent, Lineage, Progress, RollBack
from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.schema.growth import GrowthConfig, PlannedGrowth
from titan_growth.growth import schedule
from titan_growth.growth.chain import chain_of
from titan_growth.growth.operators import base as operators_module
from titan_growth.growth.operators.base import GrowthMap, operators, register_operator
from titan_growth.growth.operators.depth import DepthOperator
from titan_growth.growth.points import advise, law_tokens
from titan_growth.growth.schedule import GrowthPlan, Pace
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import ConfigError, Problem, TrainingError
from titan_growth.tools.findings import Findings

TARGET = DecoderConfig(
    dim=32, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=61, rope_theta=123.0
)


def plan_growth(
    section: GrowthConfig, target: DecoderConfig, *, steps: int = 100, tokens_per_step: int = 10, **more: Any
) -> tuple[GrowthPlan | None, list[Problem]]:
    """The plan of a run of one batch size."""
    chain = chain_of(section, target, found := Findings())
    if chain is None:
        return None, found.problems
    paces = [Pace(BatchSizes((tokens_per_step,)), 1, config.flops_per_token(10)) for config in chain.configs]
    plan = schedule.plan_growth(section, chain, found, steps=steps, paces=paces, **more)
    return plan, found.problems


def timing_problems(section: GrowthConfig, **settings: Any) -> list[Problem]:
    return plan_growth(section, TARGET, **settings)[1]


def growth(*stages: dict[str, object], enable: bool = True) -> GrowthConfig:
    return GrowthConfig.model_validate({"enable": enable, "stages": [{"factor": 2, **stage} for stage in stages]})


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

        def base(self, after: DecoderConfig, stage: PlannedGrowth) -> DecoderConfig | str:
            return replace(after, num_layers=after.num_layers // 2)

        def grow(self, before: DecoderConfig, stage: PlannedGrowth) -> GrowthMap | str:
            layers = [layer // 2 for layer in range(2 * before.num_layers)]
            order = layers[::-1] if stage.options.get("upside_down") else layers
            return GrowthMap(before=before, after=replace(before, num_layers=len(order)), layers=tuple(order))

    plan, problems = plan_growth(growth({"at": "1 step", "operator": "mine", "options": {"upside_down": True}}), TARGET)
    assert plan is not None
    assert not problems
    assert plan.chain.maps[0].layers == (5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0)
    _, problems = plan_growth(growth({"at": "1 step", "operator": "mine", "options": {"upsidedown": 1}}), TARGET)
    assert [(p.key, p.hint) for p in problems] == [
        ("growth.stages.0.options.upsidedown", "Did you mean 'upside_down'?")
    ]
    operators().clear()
    assert "mine" in operators(), "callers can change the registry"


def new_operator(without: tuple[str, ...] = (), **attributes: Any) -> type:
    """A complete operator class of a plugin, but for what is left out or changed."""
    methods = {"base": lambda self, after, stage: after, "grow": lambda self, before, stage: "no"}
    body = {"__module__": "my_plugin", "__qualname__": "Mine", "grows": frozenset({"depth"}), **methods, **attributes}
    return type("Mine", (), {key: value for key, value in body.items() if key not in without})


def a_function() -> None: ...


WRONG_OPERATORS = [
    ("mine", new_operator(__qualname__="Other"), "my_plugin.Other: my_plugin.Mine is called 'mine' already. Give one"),
    ("stack", new_operator(), "my_plugin.Mine: titan_growth.growth.operators.depth.Stack is called 'stack' already"),
    ("", new_operator(), "my_plugin.Mine: needs a name of lower-case letters, digits and _, has ''. Write @register_"),
    (None, new_operator(), "my_plugin.Mine: needs a name of lower-case letters, digits and _, has None"),
    ("new", new_operator(without=("grow",)), "my_plugin.Mine: lacks grow. Write def grow(self, before, stage)"),
    ("new", new_operator(base=None), "my_plugin.Mine: lacks base. Write def base(self, after, stage)"),
    ("new", new_operator(grow=lambda self, before: "no"), "my_plugin.Mine: grow(self, before) cannot be called with"),
    ("new", new_operator(base=staticmethod(lambda after: after)), "my_plugin.Mine: base(after) cannot be called with"),
    ("new", new_operator(without=("grows",)), "my_plugin.Mine: `grows` must say what the operator changes, is None"),
    ("new", new_operator(grows=frozenset({"height"})), "my_plugin.Mine: `grows` must say what the operator changes"),
    ("new", new_operator(options="steps"), "my_plugin.Mine: `options` must be a set of names, is 'steps'. Write opti"),
    ("new", new_operator(__init__=lambda self, size: None), "my_plugin.Mine: cannot be made without arguments. Give"),
    ("new", type("Deep", (DepthOperator,), {"__module__": "my_plugin"}), "my_plugin.Deep: lacks pattern. Write these"),
    ("new", a_function, "tests.unit.growth.test_schedule.a_function: is not a class. Write @register_operator('new')"),
]


@pytest.mark.parametrize(("name", "kind", "message"), WRONG_OPERATORS, ids=[line for *_, line in WRONG_OPERATORS])
def test_a_class_that_cannot_be_an_operator(
    name: str, kind: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that names the class and says what to write, and nothing is registered."""
    monkeypatch.setattr(operators_module, "_OPERATORS", dict(operators()))
    register_operator("mine")(new_operator())
    before = operators()
    with pytest.raises(ConfigError) as caught:
        register_operator(name)(kind)
    assert str(caught.value).startswith(message)
    assert len(caught.value.problems) == 1
    assert operators() == before


def test_an_operator_that_is_registered_without_a_name() -> None:
    with pytest.raises(
        ConfigError, match=r"my_plugin\.Mine: is registered without a name\. Write @register_operator\("
    ):
        register_operator(new_operator())  # type: ignore[arg-type]


def test_an_operator_may_say_things_by_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators_module, "_OPERATORS", dict(operators()))
    said = {"grows": frozenset({"depth"}), "options": frozenset({"x"}), "sets_size": True}
    kind = new_operator(**{name: property(lambda self, value=value: value) for name, value in said.items()})
    register_operator("new")(kind)
    assert {name: getattr(operators()["new"], name) for name in said} == said
    with pytest.raises(ConfigError, match="`grows` must say what the operator changes, is 3"):
        register_operator("other")(new_operator(grows=property(lambda self: 3)))


def test_all_flaws_of_an_operator_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        register_operator("stack")(new_operator(without=("grow", "grows", "base")))
    assert len(caught.value.problems) == 4


# ---- the chain -------------------------------------------------------------------------------------------------------


def test_the_base_is_derived_and_the_chain_ends_at_the_target() -> None:
    plan, problems = plan_growth(growth({"at": "10 steps"}, {"at": "20 steps", "factor": 3}), TARGET)
    assert not problems
    assert plan is not None
    assert [config.num_layers for config in plan.chain.configs] == [2, 4, 12]
    assert plan.chain.configs[2] == TARGET
    assert plan.chain.configs[0] == replace(TARGET, num_layers=2)


@pytest.mark.parametrize("section", [growth(), growth({"at": "10 steps", "factor": 5}, enable=False)])
def test_without_growth_the_target_is_trained(section: GrowthConfig) -> None:
    plan, problems = plan_growth(section, TARGET)
    assert not problems
    assert plan is not None
    assert plan.chain.configs == (TARGET,)
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
        ("3e6 FLOPs", Progress(step=1, flops=2_999_999), False),
        ("3e6 FLOPs", Progress(step=1, flops=3_000_000), True),
        ("15%", Progress(step=14), False),
        ("15%", Progress(step=15), True),
    ],
)
def test_due_after_the_first_step_that_reaches_the_count(at: str, progress: Progress, due: bool) -> None:
    plan, _ = plan_growth(growth({"at": at}, {"at": "20 steps"}), TARGET)
    assert plan is not None
    assert plan.due(progress, Lineage()) == (plan.planned[0] if due else None)


def test_each_growth_happens_once() -> None:
    plan, _ = plan_growth(growth({"at": "10 steps"}, {"at": "20 steps"}), TARGET)
    assert plan is not None
    assert plan.due(Progress(step=10), lineage(1)) is None
    assert plan.due(Progress(step=20), lineage(1)) is plan.planned[1]
    assert plan.due(Progress(step=99), lineage(2)) is None
    plan.require_complete(Progress(step=99), lineage(2))
    for done in range(2):
        with pytest.raises(TrainingError, match=f"the growth at {10 * (done + 1)} steps never came"):
            plan.require_complete(Progress(step=99), lineage(done))


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


def test_a_slope_is_reached_when_the_loss_has_stopped_falling() -> None:
    plan, _ = plan_growth(growth({"at": "slope 0.1 over 5 steps"}), TARGET)
    assert plan is not None
    assert plan.window_after(0) == 5
    falling = [3.0, 2.9, 2.8, 2.7, 2.6]
    assert plan.due(Progress(step=50), Lineage(), falling) is None
    assert plan.due(Progress(step=50), Lineage(), [2.6] * 4) is None, "four losses are not five"
    assert plan.due(Progress(step=50), Lineage(), [2.65, 2.6, 2.6, 2.6, 2.6]) is plan.planned[0]
    assert plan.due(Progress(step=50), Lineage(), [9.0, *falling[::-1]]) is plan.planned[0], "a rising loss has stopped"
    assert schedule.slope(falling) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "num_params", "run_tokens", "tokens"),
    [
        ("Llama3-8B", 8e9, 15e12, 6.58e9),
        ("Llama2-7B", 7e9, 2e12, 11.11e9),
        ("Llama2-13B", 13e9, 2e12, 15.84e9),
        ("Llama2-70B", 70e9, 2e12, 42.48e9),
    ],
)
def test_the_law_is_the_papers(name: str, num_params: float, run_tokens: float, tokens: float) -> None:
    """Table 4 of Du et al., to the digits that it prints."""
    assert law_tokens(num_params, 6 * num_params * run_tokens) == pytest.approx(tokens, abs=0.005e9), name


def test_auto_is_clamped_and_says_when_it_was_not_fitted() -> None:
    chain = chain_of(growth({"at": "auto"}), TARGET, Findings())
    assert chain is not None
    paces = [Pace(BatchSizes((1,)), 10, config.flops_per_token(10)) for config in chain.configs]
    plan = schedule.plan_growth(growth({"at": "auto"}), chain, found := Findings(), steps=100, paces=paces)
    assert not found.problems
    (warning,) = found.warnings
    assert str(plan.points[0]) == "500 tokens", "at most half of the run"
    assert "the law was fitted to models of 4e+08 to 3e+09 parameters, and this one has" in warning.message
    assert "cut to 500" in warning.message
    inside = replace(TARGET, dim=2048, num_layers=24, num_heads=32, num_kv_heads=32, head_dim=64, hidden_dim=5632)
    advice = advise(inside, 97_500_000_000)
    assert advice.doubts == ""
    assert 11.4e9 < advice.tokens < 12.8e9, "the 1.1B of the paper, however its parameters are counted"


def test_a_resume_does_not_argue_about_order() -> None:
    """After a roll-back, or with a slope, a later stage may be overdue: it comes one step after the one before it."""
    now = Progress(step=8, tokens=80)
    section = growth({"at": "30 tokens"}, {"at": "70 tokens"})
    assert not timing_problems(section, steps=20, tokens_per_step=10, progress=now, num_growths=0)
    section = growth({"at": "slope 0.1 over 8 steps"}, {"at": "8 steps"})
    assert not timing_problems(section, steps=16, tokens_per_step=10, progress=now, num_growths=0)


def test_a_growth_that_came_late_is_given_its_time() -> None:
    """The next stage waits as long after it as it was put off."""
    plan, _ = plan_growth(growth({"at": "10 steps"}, {"at": "12 steps"}), TARGET)
    assert plan is not None
    back = RollBack(growth=0, step=10, noticed_at=15, loss_before=1.0, loss_then=9.0, postponed_to=15)
    late = Lineage((replace(lineage(1).events[0], step=15),), roll_backs=(back,))
    assert plan.due(Progress(step=14), Lineage(roll_backs=(back,))) is None
    assert plan.due(Progress(step=15), Lineage(roll_backs=(back,))) is plan.planned[0]
    assert plan.due(Progress(step=19), late) is None
    assert plan.due(Progress(step=20), late) is plan.planned[1]
