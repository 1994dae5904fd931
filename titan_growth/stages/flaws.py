"""What is wrong with a plugin's stage, for its author: with the class when it is loaded, with its answers in a plan.

A misspelt hook would never be called, and the run would train to its end without it. So a public name that is nearly a
stage's, and every public method that is not one, is refused; so are methods that cannot be called as a stage's are.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from types import FunctionType
from typing import Any

from titan_growth.config.messages import suggestion
from titan_growth.config.plugins import origin_of, recipe_class, same_origin
from titan_growth.config.schema.recipe import Recipe
from titan_growth.stages.base import PlanContext, Stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import one_line

METHODS = tuple(name for name in vars(Stage) if not name.startswith("_") and callable(getattr(Stage, name)))
"""The methods of a stage, hooks included."""

_ATTRIBUTES = ("name", "after", "table", "settings")
_ANSWERS = (
    "enabled",
    "apply",
    "prepare_microbatch",
    "train_context",
    "train_microbatch",
    "step_metrics",
    "layer_metrics",
    "describe",
)
"""Methods for which None is no answer."""


def flaws(stage: type[Any], other: type[Any] | None, *, is_taken: bool) -> Iterator[Problem]:
    """What keeps a class from being a stage.

    Args:
        other: the class that is registered under its name already.
        is_taken: its name is that of a built-in stage.
    """
    where = origin_of(stage)
    name, after = getattr(stage, "name", None), getattr(stage, "after", ())
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
        message = f"needs a name of lower-case letters, digits and _, has {name!r}"
        yield Problem(where, message, 'Write name = "my_stage"')
        return
    if is_taken:
        yield Problem(where, f"{name!r} is the name of a stage of titan_growth itself", "Give it another name")
    elif other is not None and not same_origin(other, stage):
        yield Problem(where, f"{origin_of(other)} is called {name!r} already", "Give one of the two another name")
    if not (isinstance(after, tuple | list) and all(isinstance(item, str) for item in after)):
        yield Problem(where, f"`after` must be a tuple of names, is {after!r}", 'Write after = ("pipeline",)')
    if missing := _missing(stage):
        yield Problem(where, f"lacks {', '.join(missing)}", "Derive it from Stage and write these methods")
    elif not issubclass(stage, Stage):
        hint = f"Write class {stage.__name__}(Stage)"
        yield Problem(where, "is not derived from titan_growth.stages.base.Stage", hint)
    else:
        yield from _strange_fields(where, stage)
        yield from _strange_names(where, stage)
        yield from _strange_methods(where, stage)
    yield from _half_a_table(where, stage)


def _half_a_table(where: str, stage: type[Any]) -> Iterator[Problem]:
    table, settings = getattr(stage, "table", ""), getattr(stage, "settings", None)
    if bool(table) != (settings is not None):
        given, lacking = ("table", "settings") if table else ("settings", "table")
        hint = "Give both: the name of the TOML table and its Section"
        yield Problem(where, f"has `{given}` but no `{lacking}`", hint)


def _missing(stage: type[Any]) -> list[str]:
    """Stage methods that the class lacks or leaves abstract."""
    abstract = getattr(stage, "__abstractmethods__", ())
    others = sorted(name for name in abstract if name not in METHODS)
    return [name for name in METHODS if name in abstract or not callable(getattr(stage, name, None))] + others


def _strange_fields(where: str, stage: type[Stage]) -> Iterator[Problem]:
    """Class attributes that @dataclass has made fields, and fields of a class without it."""
    names = [one.name for one in fields(stage)]
    for name in (one for one in _ATTRIBUTES if one in names):
        hint = f"Leave out its annotation, or write {name}: ClassVar[...]"
        yield Problem(where, f"{name} is a field of the dataclass, and fields are tables of the recipe", hint)
    for name in vars(stage).get("__annotations__", ()):
        if name in (stage.table, *Recipe.model_fields) and name not in names and not hasattr(stage, name):
            message = f"{name} is no field, because the class is no dataclass"
            yield Problem(where, message, "Write @dataclass below @register_stage")


def unknown_tables(stage: type[Stage], recipe: Recipe) -> Iterator[Problem]:
    """Fields that `Stage.from_recipe` could not fill. A plugin may fill those of its stages itself."""
    if getattr(stage.from_recipe, "__func__", None) is not getattr(Stage.from_recipe, "__func__", None):
        return
    tables = type(recipe).model_fields.keys() | recipe_class().model_fields.keys()
    for name in (one.name for one in fields(stage) if one.init and one.name not in tables):
        hint = suggestion(name, tables) or "A value of its own is a ClassVar, or has no annotation"
        yield Problem(origin_of(stage), f"its field {name} is no table of the recipe", hint)


def _strange_names(where: str, stage: type[Stage]) -> Iterator[Problem]:
    """Public methods that override nothing, and attributes that are spelled almost like one that is not beside them."""
    mixed_in = {name for kind in stage.__mro__ if not issubclass(kind, Stage) for name in vars(kind)}
    own = {
        name: (value, vars(kind))
        for kind in stage.__mro__
        if kind is not Stage and issubclass(kind, Stage)
        for name, value in vars(kind).items()
        if not name.startswith("_") and name not in (*METHODS, *_ATTRIBUTES, *mixed_in)
    }
    names = {one.name for one in fields(stage)}
    for name, (value, beside) in own.items():
        is_method = isinstance(value, FunctionType | staticmethod | classmethod)
        near = get_close_matches(name, METHODS if is_method else (*METHODS, *_ATTRIBUTES), n=1, cutoff=0.6)
        if is_method:
            meant = f"Did you mean {near[0]}? A" if near else "A"
            message = f"{name} is no hook of a stage, so nothing would call it"
            yield Problem(where, message, f"{meant} helper of your own begins with _: _{name}")
        elif near and near[0] not in beside and name not in names and get_close_matches(name, near, cutoff=0.8):
            message = f"{name} is no attribute of a stage, so it would have no effect"
            yield Problem(where, message, f"Did you mean {near[0]}? One of your own begins with _: _{name}")


def _strange_methods(where: str, stage: type[Stage]) -> Iterator[Problem]:
    """Hooks that take other arguments, and those that can only answer None where an answer is needed."""
    for name in METHODS:
        function = getattr(stage, name)
        if function == getattr(Stage, name):
            continue
        wanted = [one for one in inspect.signature(getattr(Stage, name)).parameters if one != "self"]
        is_bound = not isinstance(inspect.getattr_static(stage, name), FunctionType)
        if not _takes(function, wanted, is_bound=is_bound):
            hint = f"Write def {name}({', '.join(['self', *wanted])})"
            message = f"{name}{_signature(function)} must take {' and '.join(wanted)}"
            if name == "before_step":
                hint += "; the step is context.step"
            yield Problem(where, message, hint)
        elif name in _ANSWERS and _answers_nothing(function):
            yield Problem(where, f"{name} returns nothing", f"End it with a `return`: {_wanted(name)}")


def _takes(function: Any, wanted: list[str], *, is_bound: bool) -> bool:
    """Whether a method takes these arguments in this order. They may have other names, but not those of something else:
    (parts, step) is not (parts, context), and would compare a context with a number for ever."""
    try:
        signature = inspect.signature(function)
        first = 0 if is_bound and "self" not in signature.parameters else 1
        signature.bind(*["self"][:first], *wanted)
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [name for name, one in signature.parameters.items() if one.kind in plain][first:]
    return not any(_is_another(name, one) for name, one in zip(named, wanted, strict=False))


def _is_another(name: str, wanted: str) -> bool:
    """Whether an argument is named after something else than what is wanted; one with _ in front is not used."""
    if name.startswith("_") or name == wanted:
        return False
    return name in ("parts", "context", "microbatch", "recipe") or "step" in name or "iter" in name


def _signature(function: Any) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return ""


def _answers_nothing(function: Any) -> bool:
    """Whether no path through a function returns a value: a `return` was forgotten."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return False
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return False
        if step.opname == "RETURN_VALUE":
            is_none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
            if not is_none:
                return False
        before = step
    return True


def _wanted(method: str) -> str:
    return {
        "enabled": "True or False",
        "apply": "the list of parts",
        "prepare_microbatch": "the microbatch",
        "train_context": "a context manager",
        "train_microbatch": "the loss that train() gives",
        "step_metrics": "a dict of numbers, {} for none",
        "layer_metrics": "a dict of numbers by metric and group, {} for none",
        "describe": "one line of text",
    }[method]


def ask(stage: Stage, context: PlanContext, found: Findings) -> None:
    """Adds the problems and warnings of a stage that is on, each once, and those of its answers."""
    own, where = Findings(), origin_of(type(stage))
    _ask(stage, context, own, where)
    found.problems += [problem for problem in dict.fromkeys(own.problems) if problem not in found.problems]
    found.warnings += [warning for warning in dict.fromkeys(own.warnings) if warning not in found.warnings]


def _ask(stage: Stage, context: PlanContext, found: Findings, where: str) -> None:
    enabled: object = stage.enabled(context)
    if not isinstance(enabled, bool):
        found.problem(where, f"enabled returned {_shown(enabled)}", f"Return {_wanted('enabled')}")
    if enabled is not True:
        return
    for method, findings in (("check", found.problems), ("warnings", found.warnings)):
        answer: object = getattr(stage, method)(context)
        given = list(answer) if isinstance(answer, Iterable) and not isinstance(answer, str) else [answer]
        if strange := [one for one in given if not isinstance(one, Problem)]:
            message = f"{method} gives {_shown(strange[0])}, which is no Problem"
            found.problem(where, message, "Write yield Problem(key, message, hint) for each, or leave the method out")
        findings += [one for one in given if isinstance(one, Problem)]
    if found.problems:
        return  # what is wrong may not be describable
    line: object = stage.describe(context)
    if not isinstance(line, str) or not line.strip() or "\n" in line:
        found.problem(where, f"describe returned {_shown(line)}", f"Return {_wanted('describe')}")


def strange_answer(stage: Stage, method: str, answer: object) -> Problem:
    """The problem of a stage that has answered something else than what its method is for."""
    return Problem(origin_of(type(stage)), f"{method} returned {_shown(answer)}", f"Return {_wanted(method)}")


def _shown(value: object) -> str:
    return one_line(repr(value), 60)
