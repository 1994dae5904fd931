"""Patterns of the operators, the base that is worked out, and everything that can be wrong with a chain of growths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from titan_growth.config.schema.growth import GrowthConfig, PlannedGrowth
from titan_growth.growth.axes import NEW, AxisMap, appended, axis_maps, repeated, width_problem
from titan_growth.growth.chain import chain_of
from titan_growth.growth.operators.base import GrowthMap, operators
from titan_growth.models.config import BaseSizes, DecoderConfig
from titan_growth.tools.findings import Findings

TARGET = DecoderConfig(dim=32, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=61)


def stage(**settings: Any) -> PlannedGrowth:
    return PlannedGrowth.model_validate({"at": "1 step", **settings})


def recipe(*stages: dict[str, Any], **base: Any) -> GrowthConfig:
    return GrowthConfig.model_validate(
        {"base": base, "stages": [{"at": f"{n} steps", **s} for n, s in enumerate(stages, 1)]}
    )


def layers_of(num_layers: int, **settings: Any) -> Any:
    wanted = stage(**settings)
    growth = operators()[wanted.operator].grow(replace(TARGET, num_layers=num_layers), wanted)
    return growth.layers if isinstance(growth, GrowthMap) else growth


@pytest.mark.parametrize(
    ("num_layers", "settings", "layers"),
    [
        (3, {"operator": "stack", "factor": 4}, (0, 1, 2) * 4),
        (5, {"operator": "stack", "n_layers": 7}, (0, 1, 2, 3, 4, 0, 1)),
        (3, {"operator": "interpose", "factor": 2}, (0, 0, 1, 1, 2, 2)),
        (5, {"operator": "interpose", "n_layers": 7}, (0, 0, 1, 2, 2, 3, 4)),
        (4, {"operator": "middle", "n_layers": 6}, (0, 1, 2, 1, 2, 3)),
        (3, {"operator": "middle", "n_layers": 4}, (0, 1, 1, 2)),
        (3, {"operator": "middle", "factor": 2}, (0, 1, 2, 0, 1, 2)),
        (3, {"operator": "map", "layer_map": [2, 0, 0, 1]}, (2, 0, 0, 1)),
        (3, {"operator": "map", "layer_map": [0, 1, 2]}, "layer_map lists 3 layers, not more than the 3 there are"),
        (3, {"operator": "zero_depth", "layer_map": [0, 0, 1, 2]}, (0, 0, 1, 2)),
        (
            2,
            {"operator": "zero_depth", "layer_map": [1, 0, 0]},
            "layer_map must have the 2 layers in their order, each before its copies",
        ),
        (2, {"operator": "stack", "layer_map": [0, 1, 1]}, (0, 1, 1)),
        (2, {"operator": "zero_depth", "factor": 3}, (0, 0, 0, 1, 1, 1)),
        (2, {"operator": "random_depth", "factor": 3, "mask_steps": 9}, (0, None, None, 1, None, None)),
        (3, {"operator": "middle", "factor": 3}, "adds 6 layers, more than the 3 there are; grow in two stages"),
        (
            3,
            {"operator": "map", "layer_map": [0, 3, 1, 2]},
            "layer_map names layer 3, but the model has only 3 layers by then",
        ),
        (3, {"operator": "stack", "n_layers": 3}, "3 layers are not more than the 3 there are"),
    ],
)
def test_patterns(num_layers: int, settings: dict[str, Any], layers: Any) -> None:
    assert layers_of(num_layers, **settings) == layers


def test_originals_are_the_first_copies() -> None:
    growth = GrowthMap(before=TARGET, after=replace(TARGET, num_layers=5), layers=(1, 0, None, 1, 0))
    assert growth.is_original_layer == (True, True, False, False, False)


@pytest.mark.parametrize("operator", ["split_width", "zero_width", "random_width"])
def test_the_base_of_width_growth_is_every_size_divided(operator: str) -> None:
    mask = {"mask_steps": 5} if operator == "random_width" else {}
    chain = chain_of(recipe({"operator": operator, "factor": 2, **mask}), TARGET, found := Findings())
    assert chain is not None, found.problems
    first, last = chain.configs
    assert first.sizes == {"n_layers": 12, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 24}
    assert first.head_dim == last.head_dim == 8
    assert last.sizes == TARGET.sizes


def test_depth_and_width_in_one_chain() -> None:
    stages = ({"operator": "interpose", "factor": 2}, {"operator": "split_width", "factor": 2}, {"factor": 3})
    chain = chain_of(recipe(*stages), TARGET, found := Findings())
    assert chain is not None, found.problems
    assert [(config.num_layers, config.dim) for config in chain.configs] == [(2, 16), (4, 16), (4, 32), (12, 32)]


def test_the_base_may_be_named() -> None:
    stages = ({"operator": "map", "layer_map": [0, 1, 1]}, {"operator": "stack", "factor": 4})
    chain = chain_of(recipe(*stages, n_layers=2), TARGET, found := Findings())
    assert chain is not None, found.problems
    assert [config.num_layers for config in chain.configs] == [2, 3, 12]
    uneven = {"operator": "zero_width", "dim": 32, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
    chain = chain_of(recipe(uneven, dim=24, n_heads=2, n_kv_heads=1, hidden_dim=40), TARGET, found := Findings())
    assert chain is not None, found.problems
    assert chain.configs[0].dim == 24
    assert chain.configs[1].norm_eps == pytest.approx(TARGET.norm_eps * 24 / 32)


@pytest.mark.parametrize(
    ("growth", "problem"),
    [
        (recipe({"operator": "stack"}), "growth.stages.0: does not say how large the model becomes. Give"),
        (recipe({"operator": "stack", "dim": 32}), "growth.stages.0.dim: has no meaning for 'stack'"),
        (recipe({"operator": "zero_width", "n_layers": 4}), "growth.stages.0.n_layers: has no"),
        (recipe({"operator": "map", "layer_map": [0, 0]}), "growth.stages.0: needs growth.base.n_layers"),
        (recipe({"operator": "map", "layer_map": [0, 4]}, n_layers=2), "growth.stages.0: layer_map names layer 4"),
        (recipe({"factor": 2}, n_layers=5), "growth.stages: the growths do not end at the model of"),
        (recipe({"operator": "split_width", "factor": 3}), "growth.stages.0.factor: the factor 3 does not divide dim"),
        (recipe({"operator": "zero_width", "dim": 32}, dim=40), "growth.stages.0: dim shrinks from 40 to 32"),
        (recipe({"factor": 2, "mask_steps": 9}), "growth.stages.0.mask_steps: has no meaning for 'stack'. Only random"),
        (
            recipe({"operator": "zero_depth", "factor": 2, "rescale_to_depth": True}),
            "growth.stages.0.rescale_to_depth: has no meaning for 'zero_depth': no copied layer adds anything yet",
        ),
        (
            recipe({"operator": "split_width", "factor": 2, "rescale_to_depth": True}),
            "growth.stages.0.rescale_to_depth: has no meaning for 'split_width': no copied layer",
        ),
        (
            recipe({"operator": "learn", "factor": 2, "rescale_to_depth": True}),
            "growth.stages.0: rescale_to_depth has no meaning: nothing is a copy",
        ),
        (recipe({"operator": "random_depth", "factor": 2}), "growth.stages.0.mask_steps: is missing: over how many"),
        (recipe({"factor": 2, "options": {"x": 1}}), "growth.stages.0.options.x: is no option of 'stack'. Remove it"),
        (recipe({"operator": "zero_width", "hidden_dim": 48}, n_heads=3), "growth.base.n_kv_heads: 2 key"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_chain(growth: GrowthConfig, problem: str) -> None:
    chain = chain_of(growth, TARGET, found := Findings())
    assert chain is None
    assert str(found.problems[0]).startswith(problem)


@pytest.mark.parametrize("both", [{"factor": 2, "n_layers": 4}, {"factor": 2, "layer_map": [0]}])
def test_one_way_to_say_how_large(both: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="gives both"):
        stage(**both)


# ---- axes ------------------------------------------------------------------------------------------------------------


def heads(axis: AxisMap, head_dim: int = 8) -> list[int]:
    """The map of whole heads; fails when a head is torn apart."""
    found = []
    for start in range(0, len(axis.source), head_dim):
        channels = axis.source[start : start + head_dim]
        first = channels[0]
        expected = (NEW,) * head_dim if first == NEW else tuple(range(first, first + head_dim))
        assert channels == expected, "a head is torn apart"
        assert first % head_dim == 0 or first == NEW
        found.append(first if first == NEW else first // head_dim)
    return found


@pytest.mark.parametrize(
    ("positions", "before", "after", "queries", "keys"),
    [
        (repeated, (4, 2), (8, 4), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1]),
        (repeated, (4, 2), (8, 2), [0, 1, 0, 1, 2, 3, 2, 3], None),
        (repeated, (4, 2), (6, 3), [0, 1, 2, 3, 0, 1], [0, 1, 0]),
        (appended, (4, 2), (8, 4), [0, 1, 2, 3, -1, -1, -1, -1], [0, 1, -1, -1]),
        (appended, (4, 2), (6, 2), [0, 1, -1, 2, 3, -1], None),
    ],
)
def test_query_heads_stay_with_their_keys(
    positions: Any, before: tuple[int, int], after: tuple[int, int], queries: list[int], keys: list[int] | None
) -> None:
    old = replace(TARGET, num_heads=before[0], num_kv_heads=before[1])
    new = replace(TARGET, num_heads=after[0], num_kv_heads=after[1])
    axes = axis_maps(old, new, positions)
    assert heads(axes["heads"]) == queries
    assert ("kv_heads" in axes) == (keys is not None)
    if keys is not None:
        assert heads(axes["kv_heads"]) == keys


def test_shares_of_copies_sum_to_one() -> None:
    axis = AxisMap((0, 1, 2, 0, 1, NEW), 3)
    assert axis.shares == (0.5, 0.5, 1.0, 0.5, 0.5, 1.0)
    assert axis.is_original == (True, True, True, False, False, False)
    assert axis.nearest == (0, 1, 2, 0, 1, 2)
    assert not axis.is_uniform
    assert AxisMap((0, 1, 0, 1), 2).is_uniform


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dim": 30}, "dim shrinks from 32 to 30"),
        ({"num_heads": 6, "num_kv_heads": 4}, "4 key/value heads do not divide 6 query heads"),
        ({"num_heads": 4, "num_kv_heads": 4}, "1 query heads share a key/value head, and 2 did before"),
        ({"head_dim": 16}, "heads would change their width from 8 to 16"),
        ({"dim": 33}, None),
    ],
)
def test_widths_that_cannot_be(changes: dict[str, int], problem: str | None) -> None:
    found = width_problem(TARGET, replace(TARGET, **changes))
    assert (found or "").startswith(problem or "")
    assert (found is None) == (problem is None)


BASE = BaseSizes(dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, num_layers=2)


def test_factors_of_completep_that_are_rounded_are_not_exact() -> None:
    """3 -> 6 layers change exponents only; 4 -> 12 multiply by 3."""
    target = replace(TARGET, mup=BASE)
    for before, tolerance in ((6, 0.0), (4, 1e-6)):
        section = recipe({"operator": "zero_depth", "n_layers": 12}, n_layers=before)
        chain = chain_of(section, target, found := Findings())
        assert chain is not None, found.problems
        assert chain.maps[0].tolerance == tolerance


def test_completep_has_no_rescaling_to_depth() -> None:
    section = recipe({"operator": "stack", "factor": 2, "rescale_to_depth": True})
    assert chain_of(section, TARGET, Findings()) is not None
    assert chain_of(section, replace(TARGET, mup=BASE), found := Findings()) is None
    assert [problem.key for problem in found.problems] == ["growth.stages.0.rescale_to_depth"]
    assert "under CompleteP" in found.problems[0].message
