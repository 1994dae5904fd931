"""The models of a run: from the recipe's target back to the one it starts from, and forward again through its growths.

The recipe names the last model. Where every stage has a plain factor the first one follows; where one has not (a layer
map, sizes of its own), `[growth.base]` names the sizes to start from. In both cases the chain is walked forward through
the operators and must end exactly at the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.growth import SIZES, WIDTHS, GrowthConfig, PlannedGrowth
from titan_growth.growth.operators.base import GrowthMap, Operator, operators
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import Problem

DEPTH_KEYS = ("factor", "n_layers", "layer_map")
WIDTH_KEYS = ("factor", *WIDTHS)


@dataclass(frozen=True)
class Chain:
    """The growths of a run in their order."""

    target: DecoderConfig
    maps: tuple[GrowthMap, ...]

    @property
    def configs(self) -> tuple[DecoderConfig, ...]:
        """The models of a run in their order; the last one has the target's sizes."""
        return (self.maps[0].before, *(growth.after for growth in self.maps)) if self.maps else (self.target,)


def chain_of(section: GrowthConfig, target: DecoderConfig) -> tuple[Chain | None, list[Problem]]:
    """The growths of a recipe, or everything that is wrong with them."""
    stages = section.active_stages
    known = operators()
    problems = list(_unknown(stages, known))
    if not problems:
        for index, stage in enumerate(stages):
            problems += stage_problems(f"growth.stages.{index}", stage, known[stage.operator])
    if problems or not stages:
        return (None if problems else Chain(target, ())), problems
    config, problems = _base(section, target, known)
    if config is None:
        return None, problems
    maps = []
    for index, stage in enumerate(stages):
        growth = known[stage.operator].grow(config, stage)
        if isinstance(growth, str):
            return None, [Problem(f"growth.stages.{index}", growth, _where(index, config, section))]
        if growth.masked != (stage.mask_steps is not None):
            key = f"growth.stages.{index}.mask_steps"
            message = "is missing: over how many steps is the mask to open" if growth.masked else "has no meaning"
            hint = "For example 1000" if growth.masked else "Only random_depth and random_width have a mask"
            return None, [Problem(key, f"{message} for '{stage.operator}'", hint)]
        maps.append(replace(growth, tolerance=None) if stage.noise and not growth.silent_copies else growth)
        config = growth.after
    off = [
        f"{key} = {getattr(config, field)} instead of {getattr(target, field)}"
        for key, field in SIZES.items()
        if getattr(config, field) != getattr(target, field)
    ]
    if off:
        message = f"the growths do not end at the model of [model]: they end at {', '.join(off)}"
        return None, [Problem("growth.stages", message, "Change the stages, [growth.base] or [model]")]
    return Chain(target, tuple(maps)), []


def _where(index: int, config: DecoderConfig, section: GrowthConfig) -> str:
    base = "" if section.base.given_sizes else ", a size worked out from the stages that follow"
    place = f"after {index} growth{'s' if index > 1 else ''}" if index else f"at the start{base}"
    return f"The model has {config.num_layers} layers of width {config.dim} {place}"


def _unknown(stages: list[PlannedGrowth], known: Mapping[str, Operator]) -> Iterator[Problem]:
    for index, stage in enumerate(stages):
        if stage.operator not in known:
            message = f"unknown operator '{stage.operator}'; known: {', '.join(known)}"
            yield Problem(f"growth.stages.{index}.operator", message, suggestion(stage.operator, known))


def stage_problems(key: str, stage: PlannedGrowth, operator: Operator) -> Iterator[Problem]:
    """What is wrong with a stage whatever the model: settings that its operator does not know, and would leave unused.

    Args:
        key: of the stage in the recipe; empty for one that is given as arguments.
    """
    allowed = {*(DEPTH_KEYS if "depth" in operator.grows else ()), *(WIDTH_KEYS if "width" in operator.grows else ())}
    sizes = ("factor", "layer_map", *SIZES)
    prefix = f"{key}." if key else "--"
    no_meaning = f"has no meaning for '{stage.operator}', which changes the"
    for name in sizes:
        if getattr(stage, name) is not None and name not in allowed:
            yield Problem(f"{prefix}{name}", f"{no_meaning} {' and '.join(sorted(operator.grows))}", "Remove it")
    if not any(getattr(stage, name) is not None for name in sizes):
        hint = f"Give {' or '.join(sorted(allowed, key=sizes.index))}"
        yield Problem(key or "--operator", "does not say how large the model becomes", hint)
    options: frozenset[str] = getattr(operator, "options", frozenset())
    for name in stage.options:
        if name not in options:
            hint = suggestion(name, options) or ("Remove it" if not options else f"Known: {', '.join(sorted(options))}")
            yield Problem(f"{prefix}options.{name}", f"is no option of '{stage.operator}'", hint)


def _base(
    section: GrowthConfig, target: DecoderConfig, known: Mapping[str, Operator]
) -> tuple[DecoderConfig | None, list[Problem]]:
    """The model that the run starts from."""
    given: dict[str, Any] = section.base.given_sizes
    config = target
    for index, stage in reversed(list(enumerate(section.active_stages))):
        smaller = known[stage.operator].base(config, stage)
        if isinstance(smaller, str):
            if given:
                break
            factors = [str(stage.factor) for stage in section.active_stages if stage.factor is not None]
            if stage.factor is None:
                return None, [Problem(f"growth.stages.{index}", smaller, "Name the sizes of the first model there")]
            of = f" (the factors are {' x '.join(factors)})" if len(factors) > 1 else ""
            return None, [
                Problem(
                    f"growth.stages.{index}.factor", f"{smaller}{of}", "Choose factors that divide those of [model]"
                )
            ]
        config = smaller
    else:
        return replace(config, **given), _odd(replace(config, **given))
    base = replace(target, **given)
    problems = _odd(base)
    return (None if problems else base), problems


def _odd(base: DecoderConfig) -> list[Problem]:
    if base.num_heads % base.num_kv_heads:
        message = f"{base.num_kv_heads} key/value heads do not divide {base.num_heads} query heads"
        return [Problem("growth.base.n_kv_heads", message, "Choose a divisor")]
    return []
