"""Every stage trains, alone and with every other stage.

A new stage fails here until it has an entry that switches it on; then it meets all others. What PyTorch cannot combine
must be refused before anything starts, with the key to change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.meshes import ONE_RANK, Case, mesh
from tests.harness import WarmRanks
from tests.runs import assert_parity, make_recipe, read_metrics, trainer_of
from titan_growth.run.plan import plan_run
from titan_growth.stages.order import registered_stages
from titan_growth.tools.findings import Findings

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class On:
    """How a stage is switched on: mesh degrees, settings, and the relative error it may cause."""

    degrees: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    error: float = 1e-5


AC = "activation_checkpoint__"
FLOAT8 = "quantize__linear__float8__"
STAGES = {
    "pipeline": On({"pp": 2}),
    "float8": On(settings={"model__converters": ["quantize.linear.float8"]}, error=5e-2),
    "tensor_parallel": On({"tp": 2}),
    "context_parallel": On({"cp": 2}),
    "chunked_loss": On(settings={"training__loss_chunk_tokens": 20}),
    "z_loss": On(settings={"training__z_loss_weight": 1e-7}),  # so small that the gradient norm is the plain one
    "activation_checkpoint": On(settings={f"{AC}mode": "selective", f"{AC}selective_ac_option": "2"}),
    "compile": On(settings={"compile__enable": True, "compile__backend": "aot_eager"}),
    "autocast": On(settings={"training__mixed_precision_param": "bfloat16"}, error=2e-2),
    "fsdp": On({"shard": 2}),
    "ema": On(settings={"averages__ema_decay": 0.5, "validation__enable": True}),
    "layer_metrics": On(settings={"metrics__layers_freq": 1, "metrics__attention_freq": 1}),
    "qk_clip": On(settings={"optimizer__qk_clip": 0.05}),
    "sdc_check": On(settings={"debug__sdc_check_interval": 1}),
    "growth_mask": On(
        settings={
            "model__n_layers": 4,
            "checkpoint__enable": True,
            "growth__stages": '[{at = "1 steps", operator = "random_depth", factor = 2, mask_steps = 1000}]',
        }
    ),
}
VARIANTS = {
    "pipeline, split backward": On({"pp": 2, "schedule": "ZBVZeroBubble"}),
    "float8, rowwise": On(
        settings={"model__converters": ["quantize.linear.float8"], f"{FLOAT8}recipe_name": "rowwise"}, error=5e-2
    ),
    "float8, gathered": On(
        settings={"model__converters": ["quantize.linear.float8"], f"{FLOAT8}enable_fsdp_float8_all_gather": True},
        error=5e-2,
    ),
    "tensor_parallel, no loss parallel": On({"tp": 2}, {"parallelism__disable_loss_parallel": True}),
    "context_parallel, masked documents": On({"cp": 2}, {"data__document_mask": True}),
    "activation_checkpoint, full": On(settings={f"{AC}mode": "full"}),
    "activation_checkpoint, op": On(settings={f"{AC}mode": "selective", f"{AC}selective_ac_option": "op"}),
    "fsdp, replicas": On({"replicate": 2}),
}
"""Other ways of switching stages on, which meet all others in the slow suite."""
ALL = {**STAGES, **VARIANTS}

REFUSED = {
    ("chunked_loss", "float8"): "quantize.linear.float8.filter_fqns",
    ("chunked_loss", "float8, rowwise"): "quantize.linear.float8.filter_fqns",
    ("chunked_loss", "float8, gathered"): "quantize.linear.float8.filter_fqns",
    ("compile", "pipeline, split backward"): "compile.enable",
    ("activation_checkpoint, op", "pipeline, split backward"): "activation_checkpoint.selective_ac_option",
}
"""Pairs that cannot be combined -> the key that the problem names."""

MODEL = {
    "model__dim": 64,  # Float8 needs sizes of 16 on each rank
    "model__n_layers": 2,
    "model__vocab_size": 288,
    "training__steps": 2,
    "lr_scheduler__warmup_steps": 0,
}


def test_every_stage_has_an_entry() -> None:
    known = {name for name, stage in registered_stages().items() if stage.__module__.startswith("titan_growth.")}
    assert known == STAGES.keys()


def together(*names: str) -> Case:
    """The smallest mesh on which all of these are on."""
    arguments: dict[str, Any] = {}
    for name in names:
        arguments |= {**ALL[name].degrees, **ALL[name].settings}
    return mesh(**arguments)


def kind_of(name: str) -> str:
    """The stage of an entry."""
    return name.split(",")[0]


def pairs_of(entries: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of different stages."""
    return [(one, other) for one, other in combinations(sorted(entries), 2) if kind_of(one) != kind_of(other)]


def active_stages(rank: int, num_ranks: int, recipe: Any) -> list[str]:
    """Trains to the end; the names of the active stages."""
    with trainer_of(recipe, num_ranks) as trainer:
        assert trainer.fit()
        return [stage.name for stage in trainer.runtime.engine.model.stages]


pytestmark = pytest.mark.usefixtures("warm_imports")


@pytest.fixture(scope="module")
def plain(warm_ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Lines]:
    """The model without any stage, with and without masked documents."""
    lines = {}
    for masked in (False, True):
        folder = tmp_path_factory.mktemp("plain") / "run"
        recipe = make_recipe(folder, **MODEL, **ONE_RANK.layout, data__document_mask=masked)
        assert warm_ranks(active_stages, 1, 1, recipe) == [[]]
        lines[masked] = read_metrics(folder)
    return lines


def assert_trains(
    names: tuple[str, ...], folder: Path, warm_ranks: WarmRanks, plain: dict[bool, Lines], **more: Any
) -> None:
    """All stages are active, the first step is the plain model's, and the second has a smaller loss."""
    case = together(*names)
    settings = {**MODEL, **case.layout, **more}
    if refused_by(names) == "quantize.linear.float8.filter_fqns":
        settings[f"{FLOAT8}filter_fqns"] = ["output"]  # as the problem advises
    active = set.intersection(
        *map(set, warm_ranks(active_stages, case.num_ranks, case.num_ranks, make_recipe(folder, **settings)))
    )
    wanted = {kind_of(name) for name in names}
    if "autocast" in wanted and (case.num_ranks > 1 or "float8" in wanted):
        wanted = wanted - {"autocast"} | {"fsdp"}  # which mixes precisions there
    assert wanted <= active
    lines, error = (
        [line for line in read_metrics(folder) if "num_layers" in line],
        max(ALL[name].error for name in names),
    )
    expected = plain["data__document_mask" in settings]
    assert_parity(lines[:1], expected[:1], first=error)
    assert lines[1]["loss"] < lines[0]["loss"]


def refused_by(names: tuple[str, ...]) -> str | None:
    """The key of the problem that a pair has."""
    return REFUSED.get(names) if len(names) == 2 else None


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_alone(name: str, warm_ranks: WarmRanks, plain: dict[bool, Lines], tmp_path: Path) -> None:
    assert_trains((name,), tmp_path / "run", warm_ranks, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_stage_under_muon(name: str, warm_ranks: WarmRanks, plain: dict[bool, Lines], tmp_path: Path) -> None:
    muon = {"optimizer__name": "Muon", "optimizer__lr": 5e-3}
    assert_trains((name,), tmp_path / "run", warm_ranks, plain, **muon)


ELSEWHERE = [
    *pairs_of(("pipeline", "tensor_parallel", "context_parallel", "fsdp")),
    ("compile", "pipeline"),
    ("compile", "tensor_parallel"),
    ("compile", "context_parallel"),
]
"""Pairs that other files train by default (parity, gradients, compile), and one that takes its time."""
# The runs of growth_mask grow, which takes its time.
QUICK = [pair for pair in pairs_of(name for name in STAGES if name != "growth_mask") if pair not in ELSEWHERE]
SLOW = [pair for pair in pairs_of(ALL) if pair not in QUICK]


@pytest.mark.parametrize(
    "names", [*QUICK, *(pytest.param(pair, marks=pytest.mark.slow) for pair in SLOW)], ids=" + ".join
)
def test_a_pair(names: tuple[str, str], warm_ranks: WarmRanks, plain: dict[bool, Lines], tmp_path: Path) -> None:
    """It trains, or is refused for one problem."""
    key = refused_by(names)
    if key is not None:
        assert_refused(names, key, tmp_path)
        if not key.endswith("filter_fqns"):
            return
    assert_trains(names, tmp_path / "run", warm_ranks, plain)


def assert_refused(names: tuple[str, ...], key: str, folder: Path) -> None:
    case = together(*names)
    recipe = make_recipe(folder / "refused", **MODEL, **case.layout)
    plan = plan_run(recipe, found := Findings(), num_ranks=case.num_ranks, device_type="cpu")
    assert plan is None
    assert [problem.key for problem in found.problems] == [key]
