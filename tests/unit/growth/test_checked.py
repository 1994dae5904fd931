"""What an operator of a plugin may answer: everything else is one sentence in the plan, and no traceback later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from titan_growth.config.schema.growth import GrowthConfig, PlannedGrowth
from titan_growth.growth.axes import AxisMap, axis_maps, repeated
from titan_growth.growth.chain import chain_of
from titan_growth.growth.operators import base as registry
from titan_growth.growth.operators.base import GrowthMap, operators, register_operator
from titan_growth.growth.operators.checked import NoAnswer, base_of, map_of
from titan_growth.models.config import DecoderConfig
from titan_growth.tools.errors import ConfigError
from titan_growth.tools.findings import Findings

BEFORE = DecoderConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, hidden_dim=16, vocab_size=32)
DEEPER = replace(BEFORE, num_layers=4)
WIDER = replace(BEFORE, num_heads=4, num_kv_heads=4, dim=16, hidden_dim=32)
GOOD: dict[str, Any] = {"before": BEFORE, "after": DEEPER, "layers": (0, 1, 0, 1)}
STAGE = PlannedGrowth(at="1 step", operator="mine", n_layers=4)


class Mine:
    """Returns what it is given."""

    grows = frozenset({"depth"})

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def base(self, after: DecoderConfig, stage: PlannedGrowth) -> Any:
        return self.answer

    def grow(self, before: DecoderConfig, stage: PlannedGrowth) -> Any:
        return self.answer


def widths(**changes: Any) -> dict[str, Any]:
    axes = axis_maps(BEFORE, WIDER, repeated)
    return {"before": BEFORE, "after": WIDER, "layers": (0, 1), "axes": {**axes, **changes}}


STRANGE: list[tuple[Any, str]] = [
    (None, "returned None, neither a GrowthMap nor a sentence"),
    ((0, 1, 0, 1), "returned (0, 1, 0, 1), neither a GrowthMap nor a sentence"),
    ({"layers": (0, 1, 0)}, "`layers` has 3 sources for 4 layers"),
    ({"layers": [0, 1, 0, 1]}, "`layers` is [0, 1, 0, 1], no tuple"),
    ({"layers": (0, 1, 2, 1)}, "`layers` names layer 2, and the model has 0 to 1"),
    ({"layers": (0, 1, -1, 1)}, "`layers` names layer -1, and the model has 0 to 1"),
    ({"layers": ("0", 1, 0, 1)}, "`layers` holds '0', neither a layer's number nor None"),
    ({"before": WIDER}, "`before` is another model than the one that grows"),
    ({"after": replace(DEEPER, vocab_size=33)}, "`after` has another vocab_size, which no growth changes"),
    ({"after": replace(DEEPER, num_layers=4.0)}, "in `after` n_layers is 4.0"),
    ({"after": 4}, "`after` is 4, no DecoderConfig"),
    ({"axes": None}, "`axes` is None, no table of AxisMaps"),
    ({"tolerance": "0"}, "`tolerance` is '0', not a number of at least 0, or None"),
    ({"tolerance": -1.0}, "`tolerance` is -1.0, not a number of at least 0, or None"),
    ({"new_channels": "ones"}, "`new_channels` is 'ones', not 'zero' or 'random'"),
    ({"masked": None}, "`masked` is None, not True or False"),
    ({**widths(), "layers": (0, 1)}, "it changes a width, which the class's `grows` does not name"),
]


@pytest.mark.parametrize(("answer", "message"), STRANGE, ids=[message[:45] for _, message in STRANGE])
def test_an_answer_that_is_no_map(answer: Any, message: str) -> None:
    answer = GrowthMap(**{**GOOD, **answer}) if isinstance(answer, dict) else answer
    found = map_of(Mine(answer), BEFORE, STAGE)
    assert isinstance(found, NoAnswer)
    assert found.startswith(f"{Mine.__module__}.Mine.grow returned ")
    assert message in found


WIDE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_dim": AxisMap(tuple(range(16)), 16)}, "axis hidden_dim goes from 16 to 16, and the model grows from 16"),
    ({"hidden_dim": AxisMap((16,) * 32, 16)}, "axis hidden_dim names position 16, and there are 0 to 15"),
    ({"width": AxisMap((0,), 1)}, "`axes` names 'width'; the axes are dim, hidden_dim, heads, kv_heads"),
]


@pytest.mark.parametrize(("changes", "message"), WIDE, ids=[message[:40] for _, message in WIDE])
def test_an_axis_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    mine = Mine(GrowthMap(**widths(**changes)))
    mine.grows = frozenset({"width"})
    assert message in str(map_of(mine, BEFORE, STAGE))


def test_an_axis_that_is_missing_or_too_much() -> None:
    whole = widths()
    del whole["axes"]["dim"]
    mine = Mine(GrowthMap(**whole))
    mine.grows = frozenset({"width"})
    assert "`axes` has no dim, which grows from 8 to 16" in str(map_of(mine, BEFORE, STAGE))
    mine.answer = GrowthMap(**{**widths(), "layers": (1, 0)})
    assert "`layers` changes the depth, which the class's `grows` does not name" in str(map_of(mine, BEFORE, STAGE))
    mine.answer = GrowthMap(**widths())
    assert map_of(mine, BEFORE, STAGE) is mine.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "base returned None, neither a DecoderConfig nor a sentence"),
        ((BEFORE,), "base returned (DecoderConfig("),
        (replace(BEFORE, num_layers=1.0), "base returned a model whose n_layers is 1.0"),
        (replace(BEFORE, num_layers=-1), "base returned a model whose n_layers is -1"),
    ],
)
def test_a_base_that_is_no_model(answer: Any, message: str) -> None:
    found = base_of(Mine(answer), DEEPER, STAGE)
    assert isinstance(found, NoAnswer)
    assert message in found


def test_sentences_and_models_pass() -> None:
    assert map_of(Mine("needs more"), BEFORE, STAGE) == "needs more"
    assert base_of(Mine("needs more"), DEEPER, STAGE) == "needs more"
    assert base_of(Mine(BEFORE), DEEPER, STAGE) is BEFORE
    whole = GrowthMap(**GOOD)
    assert map_of(Mine(whole), BEFORE, STAGE) is whole


def test_a_factor_comes_true() -> None:
    stage = PlannedGrowth(at="1 step", operator="mine", factor=3)
    found = map_of(Mine(GrowthMap(**GOOD)), BEFORE, stage)
    assert (
        "Mine.grow makes n_layers 2 -> 4 with factor = 3. If it sets the size itself, write sets_size = True" in found
    )
    assert isinstance(map_of(Mine(GrowthMap(**GOOD)), BEFORE, stage.model_copy(update={"factor": 2})), GrowthMap)


# ---- an operator that says itself how large the model becomes -------------------------------------------------------


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OPERATORS", dict(operators()))


class Plus2:
    """Two more layers, whatever the recipe says."""

    grows = frozenset({"depth"})
    sets_size = True

    def base(self, after: DecoderConfig, stage: PlannedGrowth) -> DecoderConfig | str:
        return replace(after, num_layers=after.num_layers - 2) if after.num_layers > 2 else "needs more than 2 layers"

    def grow(self, before: DecoderConfig, stage: PlannedGrowth) -> GrowthMap | str:
        count = before.num_layers
        after = replace(before, num_layers=count + 2)
        return GrowthMap(before=before, after=after, layers=(*range(count), count - 1, count - 1))


def problems_of(**stage: Any) -> list[str]:
    section = GrowthConfig(stages=[PlannedGrowth(at="1 step", operator="plus2", **stage)])
    chain_of(section, replace(BEFORE, num_layers=6), found := Findings())
    return [str(problem) for problem in found.problems]


@pytest.mark.usefixtures("_registry")
def test_an_operator_that_sets_the_size() -> None:
    register_operator("plus2")(Plus2)
    section = GrowthConfig(stages=[PlannedGrowth(at="1 step", operator="plus2")])
    chain = chain_of(section, replace(BEFORE, num_layers=6), Findings())
    assert chain is not None
    assert [config.num_layers for config in chain.configs] == [4, 6]
    (problem,) = problems_of(factor=2)
    assert problem == (
        "growth.stages.0.factor: has no meaning for 'plus2', which says itself how large the model becomes. Remove it"
    )


@pytest.mark.usefixtures("_registry")
def test_without_saying_so_it_needs_a_size() -> None:
    """And is told how to say so."""
    register_operator("plus2")(type("Plus2", (Plus2,), {"sets_size": False}))
    assert problems_of() == [
        "growth.stages.0: does not say how large the model becomes. Give factor or layer_map or n_layers; an operator "
        "that sets the size itself says so with sets_size = True in its class"
    ]
    with pytest.raises(ConfigError, match="`sets_size` must be True or False, is 'yes'"):
        register_operator("plus2")(type("Plus2", (Plus2,), {"sets_size": "yes"}))
