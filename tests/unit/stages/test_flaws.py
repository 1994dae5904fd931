"""What the author of a stage is told: about the class when it is loaded, about its answers when the plan is made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from titan_growth.config.schema.recipe import Recipe
from titan_growth.config.section import Section
from titan_growth.engine.build import BuiltModel
from titan_growth.layout.mesh import Mesh
from titan_growth.layout.mesh_shape import MeshShape
from titan_growth.models import llama
from titan_growth.models.config import DecoderConfig
from titan_growth.stages.base import BuildContext, PlanContext, Stage
from titan_growth.stages.flaws import METHODS, ask, flaws, unknown_tables
from titan_growth.stages.order import registered_stages
from titan_growth.tools.errors import ConfigError, Problem
from titan_growth.tools.findings import Findings

PAGE = Path(__file__).parents[3] / "docs" / "extending" / "adding_a_stage.md"
CONFIG = DecoderConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, hidden_dim=16, vocab_size=32)
PLAN = PlanContext(CONFIG, MeshShape(), "cpu", 8, llama)


@dataclass
class Good(Stage):
    """All methods, as the page has them."""

    name: ClassVar[str] = "good"
    after = ("pipeline",)
    SCALE = 3

    table_of_mine: int = 0

    def enabled(self, context):
        return True

    def check(self, context):
        yield from self._nothing()

    def _nothing(self):
        return iter(())

    def apply(self, parts, context):
        return parts

    def before_step(self, parts, context):
        pass

    def prepare_microbatch(self, microbatch, _):
        return microbatch

    def after_backward(self, *args):
        pass

    def describe(self, context):
        return "good: as it should be"


def with_(**attributes: Any) -> type[Good]:
    """The good stage with something else in it."""
    return type("Mine", (Good,), {"__module__": "mine", "__qualname__": "Mine", **attributes})


def flaws_of(kind: type) -> list[str]:
    return [str(problem) for problem in flaws(kind, None, is_taken=False)]


def test_what_the_page_says_passes() -> None:
    assert flaws_of(Good) == []
    for kind in registered_stages().values():
        assert flaws_of(kind) == []


def test_a_hook_is_a_method_of_the_page() -> None:
    """The table on the page is complete, with the arguments that each method gets."""
    for name in METHODS:
        if name == "from_recipe":
            continue
        arguments = ", ".join(inspect.signature(getattr(Stage, name)).parameters)
        assert f"| `{name}({arguments})` |" in PAGE.read_text()


def nothing(self, parts, context):
    pass


abstract = with_()
abstract.__abstractmethods__ = frozenset({"_patch"})

STRANGE: list[tuple[str, type, str]] = [
    (
        "misspelt hook",
        with_(befor_step=nothing),
        "befor_step is no hook of a stage, so nothing would call it. Did you mean before_step? A helper of your own "
        "begins with _: _befor_step",
    ),
    (
        "public helper",
        with_(lowest=nothing),
        "lowest is no hook of a stage, so nothing would call it. A helper of your own begins with _: _lowest",
    ),
    (
        "static helper",
        with_(of_shape=staticmethod(nothing)),
        "of_shape is no hook of a stage, so nothing would call it. A helper of your own begins with _: _of_shape",
    ),
    (
        "misspelt attribute",
        with_(aftr=("pipeline",)),
        "aftr is no attribute of a stage, so it would have no effect. Did you mean after? One of your own begins with "
        "_: _aftr",
    ),
    (
        "old arguments",
        with_(before_step=lambda self, parts, step: None),
        "before_step(self, parts, step) must take parts and context. Write def before_step(self, parts, context); the "
        "step is context.step",
    ),
    (
        "an attribute that is a field",
        dataclass(with_(name="good", __annotations__={"name": str})),
        "name is a field of the dataclass, and fields are tables of the recipe. Leave out its annotation, or write "
        "name: ClassVar[...]",
    ),
    (
        "no dataclass",
        with_(__annotations__={"training": object, "handles": list}),
        "training is no field, because the class is no dataclass. Write @dataclass below @register_stage",
    ),
    (
        "the step under another name",
        with_(before_step=lambda self, model, step_number: None),
        "before_step(self, model, step_number) must take parts and context. Write def before_step(self, parts, "
        "context); the step is context.step",
    ),
    (
        "the wrong way round",
        with_(after_backward=lambda self, context, parts: None),
        "after_backward(self, context, parts) must take parts and context. Write def after_backward(self, parts, "
        "context)",
    ),
    (
        "no signature",
        with_(describe=str),
        "describe must take context. Write def describe(self, context)",
    ),
    (
        "abstract",
        abstract,
        "lacks _patch. Derive it from Stage and write these methods",
    ),
    (
        "too few arguments",
        with_(after_optimizer_step=lambda self, parts: None),
        "after_optimizer_step(self, parts) must take parts and context. Write def after_optimizer_step(self, parts, "
        "context)",
    ),
    (
        "no context",
        with_(describe=lambda self: "x"),
        "describe(self) must take context. Write def describe(self, context)",
    ),
    (
        "apply without return",
        with_(apply=nothing),
        "apply returns nothing. End it with a `return`: the list of parts",
    ),
    (
        "enabled without return",
        with_(enabled=lambda self, context: None),
        "enabled returns nothing. End it with a `return`: True or False",
    ),
]


@pytest.mark.parametrize(("kind", "message"), [case[1:] for case in STRANGE], ids=[case[0] for case in STRANGE])
def test_a_class_that_would_not_do_what_it_says(kind: type, message: str) -> None:
    assert flaws_of(kind) == [f"mine.Mine: {message}"]


def two(this, batch, ctx):
    return batch


def one(this, ctx):
    return "text"


class Mixin:
    def patch(self, part):
        raise NotImplementedError

    def enabled(self, context):
        return True


ORDINARY: list[tuple[str, type]] = [
    ("a nested table", with_(Settings=type("Settings", (Section,), {}), settings=None, table="")),
    ("beside what they are spelled like", with_(name="mine", names=("a",), named=property(one))),
    ("arguments of other names", with_(apply=two, prepare_microbatch=two, describe=one)),
    ("arguments that are not used", with_(before_step=lambda self, _parts, _step: None)),
    ("without self", with_(enabled=staticmethod(lambda context: True), describe=classmethod(one))),
    ("decorated", with_(apply=torch.no_grad()(two), describe=functools.wraps(one)(lambda *words: "text"))),
    ("what a mixin brings", type("Mine", (Mixin, Good), {"patch": nothing})),
]


@pytest.mark.parametrize("kind", [case[1] for case in ORDINARY], ids=[case[0] for case in ORDINARY])
def test_a_class_that_is_written_in_another_way_passes(kind: type) -> None:
    assert flaws_of(kind) == []


def test_a_field_that_is_no_table_is_named() -> None:
    trainig = dataclass(
        with_(
            __annotations__={"trainig": object, "scale": float, "kept": list},
            trainig=None,
            scale=2.0,
            kept=field(default_factory=list, init=False),
        )
    )
    assert [str(problem) for problem in unknown_tables(trainig, Recipe())] == [
        "mine.Mine: its field table_of_mine is no table of the recipe. A value of its own is a ClassVar, or has no "
        "annotation",
        "mine.Mine: its field trainig is no table of the recipe. Did you mean 'training'?",
        "mine.Mine: its field scale is no table of the recipe. A value of its own is a ClassVar, or has no annotation",
    ]
    own = with_(from_recipe=classmethod(lambda cls, recipe: cls(3)))
    assert list(unknown_tables(own, Recipe())) == []


def test_a_base_class_of_the_author_is_looked_at_too() -> None:
    class Base(Good):
        def befor_step(self, parts, context):
            pass

    assert "Did you mean before_step?" in flaws_of(type("Mine", (Base,), {}))[0]


def asked(**attributes: Any) -> Findings:
    ask(with_(**attributes)(), PLAN, found := Findings())
    return found


def told(self: Stage, context: PlanContext) -> Iterator[Any]:
    yield "too low"


ANSWERS: list[tuple[str, dict[str, Any], str]] = [
    ("check yields text", {"check": told}, "check gives 'too low', which is no Problem. Write yield Problem("),
    ("warnings yields text", {"warnings": told}, "warnings gives 'too low', which is no Problem. Write yield Problem("),
    ("check gives text", {"check": lambda self, context: "too low"}, "check gives 'too low', which is no Problem."),
    ("check gives None", {"check": lambda self, context: None}, "check gives None, which is no Problem. Write yield"),
    ("a list of None", {"warnings": lambda self, context: [None]}, "warnings gives None, which is no Problem. "),
    ("no line", {"describe": lambda self, context: context and None}, "describe returned None. Return one line of te"),
    ("lines", {"describe": lambda self, context: "a\nb"}, "describe returned 'a\\nb'. Return one line of text"),
    ("truth", {"enabled": lambda self, context: 0.5}, "enabled returned 0.5. Return True or False"),
]


@pytest.mark.parametrize(("attributes", "message"), [case[1:] for case in ANSWERS], ids=[case[0] for case in ANSWERS])
def test_an_answer_that_is_none(attributes: dict[str, Any], message: str) -> None:
    (problem,) = asked(**attributes).problems
    assert str(problem).startswith(f"mine.Mine: {message}")


def test_what_a_stage_finds_is_added_once() -> None:
    def check(self: Stage, context: PlanContext) -> Iterator[Problem]:
        yield Problem("mine.level", "is too high")
        yield Problem("mine.level", "is too high")

    found = asked(check=check, warnings=lambda self, context: [Problem("mine.level", "does little")])
    assert [str(problem) for problem in found.problems] == ["mine.level: is too high"]
    assert [str(warning) for warning in found.warnings] == ["mine.level: does little"]
    assert asked(enabled=lambda self, context: False, check=check) == Findings(), "it is off"


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("train_context", lambda model: model.train_context().__enter__()),
        ("prepare_microbatch", lambda model: model.prepare_microbatch({})),
    ],
)
def test_a_return_that_is_missing_on_one_path(method: str, call: Callable[[BuiltModel], Any]) -> None:
    """That cannot be seen in the class: the first call says so."""

    def sometimes(self, *args):
        if not args:
            return args

    stage = with_(**{method: sometimes})()
    context = BuildContext(CONFIG, MeshShape(), "cpu", 8, llama, mesh=Mesh(MeshShape(), "cpu"))
    with pytest.raises(ConfigError, match=rf"^mine.Mine: {method} returned None. Return "):
        call(BuiltModel([nn.Linear(1, 1)], [stage], context))


def test_every_hook_gets_the_step() -> None:
    steps = []
    stage = with_(
        before_step=lambda self, parts, context: steps.append(context.step),
        after_backward=lambda self, parts, context: steps.append(context.step),
        after_optimizer_step=lambda self, parts, context: steps.append(context.step),
    )()
    context = BuildContext(CONFIG, MeshShape(), "cpu", 8, llama, mesh=Mesh(MeshShape(), "cpu"))
    model = BuiltModel([nn.Linear(1, 1)], [stage], context)
    model.before_step(7)
    model.after_backward()
    model.after_optimizer_step()
    assert steps == [7, 7, 7]
