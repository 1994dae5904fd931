"""The models of a run: from the recipe's target back to its first model, and forward again through the growths.

The recipe names the last model. If every stage has a plain factor, the first model follows; otherwise (a layer map,
explicit sizes) `[growth.base]` gives its sizes. Either way the operators then run forward, and must end at the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from titan_growth.config.fields import no_option
from titan_growth.config.messages import suggestion
from titan_growth.config.schema.growth import SIZES, WIDTHS, GrowthConfig, PlannedGrowth
from titan_growth.growth.multipliers import is_exact
from titan_growth.growth.operators.base import ROUNDING, GrowthMap, Operator, operators
from titan_growth.growth.operators.checked import NoAnswer, base_of, map_of
from titan_growth.models.config import DecoderConfig
from titan_growth.models.parametrization import branch_scale
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many

DEPTH_KEYS = ("factor", "n_layers", "layer_map")
WIDTH_KEYS = ("factor", *WIDTHS)

_OF_THE_PLUGIN = "Mend the plugin: docs/extending/adding_an_operator.md has the contract"


@dataclass(frozen=True)
class Chain:
    """The growths of a run in their order."""

    target: DecoderConfig
    maps: tuple[GrowthMap, ...]

    @property
    def configs(self) -> tuple[DecoderConfig, ...]:
        """The models of a run in their order; the last one has the target's sizes."""
        return (self.maps[0].before, *(growth_map.after for growth_map in self.maps)) if self.maps else (self.target,)


def chain_of(section: GrowthConfig, target: DecoderConfig | None, found: Findings) -> Chain | None:
    """The growths of a recipe; None when something is wrong with them, or there is no target."""
    if target is None:
        return None
    if not section.active_stages:
        return Chain(target, ())
    own = Findings()
    _check_operators(section, own)
    base = None if own.problems else _base(section, target, own)
    maps = [] if base is None else _maps(section, base, own)
    if not own.problems:
        _check_end(maps[-1].after, target, own)
    found.extend(own)
    return None if own.problems else Chain(target, tuple(maps))


def _check_operators(section: GrowthConfig, found: Findings) -> None:
    """Checks operators and their settings, without a model."""
    known = operators()
    for index, planned in enumerate(section.active_stages):
        if planned.operator not in known:
            message = f"unknown operator '{planned.operator}'; known: {', '.join(known)}"
            found.problem(f"growth.stages.{index}.operator", message, suggestion(planned.operator, known))
    if found.problems:
        return
    for index, planned in enumerate(section.active_stages):
        check_planned(f"growth.stages.{index}", planned, known[planned.operator], found)


def check_planned(key: str, planned: PlannedGrowth, operator: Operator, found: Findings) -> None:
    """Reports settings of a growth that its operator would ignore.

    Args:
        key: of the growth in the recipe; empty for one given as arguments.
    """
    allowed = {*(DEPTH_KEYS if "depth" in operator.grows else ()), *(WIDTH_KEYS if "width" in operator.grows else ())}
    sizes = ("factor", "layer_map", *SIZES)
    does = f"changes the {' and '.join(sorted(operator.grows))}" if operator.grows else "changes no size"
    if sets_size := getattr(operator, "sets_size", False):
        allowed, does = set(), "says itself how large the model becomes"
    prefix = f"{key}." if key else "--"
    for name in sizes:
        if getattr(planned, name) is not None and name not in allowed:
            found.problem(f"{prefix}{name}", f"has no meaning for '{planned.operator}', which {does}", "Remove it")
    if operator.grows and not sets_size and not any(getattr(planned, name) is not None for name in sizes):
        hint = f"Give {' or '.join(sorted(allowed, key=sizes.index))}"
        if not type(operator).__module__.startswith("titan_growth."):
            hint += "; an operator that sets the size itself says so with sets_size = True in its class"
        found.problem(key or "--operator", "does not say how large the model becomes", hint)
    options: frozenset[str] = getattr(operator, "options", frozenset())
    for name in planned.options:
        if name not in options:
            found.problems.append(no_option(f"{prefix}options.{name}", planned.operator, name, sorted(options)))


def _base(section: GrowthConfig, target: DecoderConfig, found: Findings) -> DecoderConfig | None:
    """The model that the run starts from."""
    known = operators()
    given: dict[str, Any] = section.base.given_sizes
    config = target
    for index, planned in reversed(list(enumerate(section.active_stages))):
        smaller = base_of(known[planned.operator], config, planned)
        if isinstance(smaller, NoAnswer):
            found.problem(f"growth.stages.{index}.operator", smaller, _OF_THE_PLUGIN)
            return None
        if not isinstance(smaller, str):
            config = smaller
        elif given:
            config = target
            break
        elif planned.factor is None:
            found.problem(f"growth.stages.{index}", smaller, "Name the sizes of the first model there")
            return None
        else:
            factors = [str(each.factor) for each in section.active_stages if each.factor is not None]
            of = f" (the factors are {' x '.join(factors)})" if len(factors) > 1 else ""
            hint = "Choose factors that divide those of [model]"
            found.problem(f"growth.stages.{index}.factor", f"{smaller}{of}", hint)
            return None
    base = replace(config, **given, rope_theta=section.base.rope_theta or target.rope_theta)
    if base.num_heads % base.num_kv_heads:
        message = f"{base.num_kv_heads} key/value heads do not divide {base.num_heads} query heads"
        found.problem("growth.base.n_kv_heads", message, "Choose a divisor")
        return None
    return base


def _maps(section: GrowthConfig, base: DecoderConfig, found: Findings) -> list[GrowthMap]:
    """The growths from the first model on, up to the first impossible one."""
    known, config = operators(), base
    maps: list[GrowthMap] = []
    for index, planned in enumerate(section.active_stages):
        growth_map = map_of(known[planned.operator], config, planned)
        if isinstance(growth_map, NoAnswer):
            found.problem(f"growth.stages.{index}.operator", growth_map, _OF_THE_PLUGIN)
            break
        if isinstance(growth_map, str):
            found.problem(f"growth.stages.{index}", growth_map, _where(index, config, section))
            break
        if planned.rope_theta == config.rope_theta:
            key, message = f"growth.stages.{index}.rope_theta", "is what the model has by then"
            found.problem(key, message, "Remove it, or set growth.base.rope_theta to what it has at first")
            break
        growth_map = with_rope_theta(growth_map, planned)
        if growth_map.masked != (planned.mask_steps is not None):
            key = f"growth.stages.{index}.mask_steps"
            message = "is missing: over how many steps is the mask to open" if growth_map.masked else "has no meaning"
            hint = "For example 1000" if growth_map.masked else "Only random_depth and random_width have a mask"
            found.problem(key, f"{message} for '{planned.operator}'", hint)
            break
        if planned.rescale_to_depth and (why := nothing_to_rescale(planned, growth_map)):
            found.problem(f"growth.stages.{index}.rescale_to_depth", why, "Remove it")
            break
        if growth_map.tolerance == 0.0 and not is_exact(growth_map):
            growth_map = replace(growth_map, tolerance=ROUNDING)
        differs = planned.rescale_to_depth or (planned.noise and not growth_map.silent_copies)
        maps.append(replace(growth_map, tolerance=None) if differs else growth_map)
        config = growth_map.after
    return maps


def with_rope_theta(growth_map: GrowthMap, planned: PlannedGrowth) -> GrowthMap:
    """The map with the rotary base that the growth asks for, under which the same weights compute something else."""
    if planned.rope_theta is None:
        return growth_map
    return replace(growth_map, after=replace(growth_map.after, rope_theta=planned.rope_theta), tolerance=None)


def nothing_to_rescale(planned: PlannedGrowth, growth_map: GrowthMap) -> str:
    """Why `rescale_to_depth` has no meaning; empty when it has one."""
    if branch_scale(growth_map.before) != branch_scale(growth_map.after):
        return "has no meaning under CompleteP, where the branches of a deeper model have a smaller factor"
    return (
        "" if growth_map.copies_write else f"has no meaning for '{planned.operator}': no copied layer adds anything yet"
    )


def _where(index: int, config: DecoderConfig, section: GrowthConfig) -> str:
    base = "" if section.base.given_sizes else ", a size worked out from the stages that follow"
    place = f"after {many(index, 'growth')}" if index else f"at the start{base}"
    return f"The model has {config.num_layers} layers of width {config.dim} {place}"


def _check_end(last: DecoderConfig, target: DecoderConfig, found: Findings) -> None:
    """The growths end at the model of the recipe."""
    off = [
        f"{key} = {getattr(last, field)} instead of {getattr(target, field)}"
        for key, field in (*SIZES.items(), ("rope_theta", "rope_theta"))
        if getattr(last, field) != getattr(target, field)
    ]
    if off:
        message = f"the growths do not end at the model of [model]: they end at {', '.join(off)}"
        found.problem("growth.stages", message, "Change the stages, [growth.base] or [model]")
