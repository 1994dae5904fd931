"""The learning rate, against torchtitan's formula written out once more, and over growths."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from titan_growth.config.batch_sizes import BatchSizes
from titan_growth.config.schema.growth import GrowthConfig
from titan_growth.config.schema.recipe import LRSchedulerConfig
from titan_growth.run.lr_schedule import LRSchedule
from titan_growth.tools.errors import Problem
from titan_growth.tools.findings import Findings

PEAK = 8e-4


def torchtitan(step: int, *, steps: int, warmup: int, ratio: float | None, kind: str, floor: float) -> float:
    """Factor of step (from 1), as components/lr_scheduler.py of 0.2.2 computes it from the 0-based LambdaLR step."""
    current = step - 1
    warmup = min(warmup, steps)
    decay = steps - warmup if ratio is None else min(round(steps * ratio), steps - warmup)
    stable = steps + 1 - warmup - decay  # one virtual step more, so that the last one still learns
    if current < warmup:
        return (current + 1) / warmup
    if current < warmup + stable:
        return 1.0
    progress = (current + 1 - (warmup + stable)) / decay
    shape = {"linear": 1 - progress, "sqrt": 1 - math.sqrt(progress), "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return floor + (1 - floor) * shape[kind]


def schedule(steps: int = 100, growth: GrowthConfig | None = None, **section: object) -> LRSchedule:
    return LRSchedule(LRSchedulerConfig(**section), lr=PEAK, steps=steps, growth=growth or GrowthConfig())  # type: ignore[arg-type]


def growth(*stages: dict[str, object], **base: object) -> GrowthConfig:
    return GrowthConfig.model_validate({"stages": [{"factor": 2, **stage} for stage in stages], "base": base})


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.1, 0.35, 0.8, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 1, 20, 99, 100, 250])
def test_torchtitans_formula(kind: str, ratio: float | None, floor: float, warmup: int) -> None:
    found = schedule(decay_type=kind, decay_ratio=ratio, min_lr_factor=floor, warmup_steps=warmup)
    factors = [found(step) / PEAK for step in range(1, 101)]
    expected = [
        torchtitan(step, steps=100, warmup=warmup, ratio=ratio, kind=kind, floor=floor) for step in range(1, 101)
    ]
    assert factors == pytest.approx(expected, abs=1e-12)
    assert factors[-1] > floor, "the last step does not learn"
    top = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(factors[top:])), "it rises after the peak"
    assert all(a <= b for a, b in pairwise(factors[: top + 1])), "it falls in the warmup"


def test_known_values() -> None:
    found = schedule(steps=10, warmup_steps=2)
    assert [found(step) / PEAK for step in range(1, 11)] == pytest.approx(
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_total_steps_stretches_or_cuts_the_layout() -> None:
    longer = schedule(steps=50, total_steps=100, warmup_steps=10)
    assert [longer(step) for step in range(1, 51)] == [schedule(warmup_steps=10)(step) for step in range(1, 51)]
    shorter = schedule(steps=100, total_steps=50, warmup_steps=10, min_lr_factor=0.1)
    assert [shorter(step) for step in range(51, 101)] == pytest.approx([PEAK * 0.1] * 50)


# ---- growth ----------------------------------------------------------------------------------------------------------


def test_before_a_growth_the_schedule_is_that_of_the_whole_run() -> None:
    growing, plain = schedule(growth=growth({"at": "40 steps"}), warmup_steps=10), schedule(warmup_steps=10)
    assert [growing(step, [40]) for step in range(1, 41)] == [plain(step) for step in range(1, 41)]
    assert [growing(step) for step in range(1, 101)] == [plain(step) for step in range(1, 101)]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_restart_is_a_schedule_of_its_own_to_the_runs_end(kind: str) -> None:
    found = schedule(growth=growth({"at": "40 steps"}), warmup_steps=10, decay_type=kind)
    fresh = schedule(steps=60, warmup_steps=10, decay_type=kind)
    assert [found(40 + step, [40]) for step in range(1, 61)] == [fresh(step) for step in range(1, 61)]
    assert found(41, [40]) == PEAK / 10
    assert 0 < found(100, [40]) < PEAK / 49


@pytest.mark.parametrize(("at", "decays"), [(45, 20), (80, 19), (85, 14), (99, 0)])
def test_restart_anneals_as_long_as_the_ungrown_run(at: int, decays: int) -> None:
    """Warmup-stable-decay: the last fifth of the run, whenever it grew, as far as the warmup leaves room."""
    section = {"warmup_steps": 1, "decay_ratio": 0.2, "decay_type": "sqrt"}
    found, ungrown = schedule(growth=growth({"at": f"{at} steps"}), **section), schedule(**section)
    curve = [found(step, [at]) for step in range(1, 101)]
    below_peak = [step for step in range(at + 1, 101) if curve[step - 1] < PEAK]
    assert len(below_peak) == max(0, decays - 1), "the first step of a decay is still at the peak"
    if at <= 79:
        assert curve[80:] == [ungrown(step) for step in range(81, 101)]


def test_restart_begins_where_the_growth_really_was() -> None:
    """A growth given in tokens happens at a step that only the lineage knows."""
    found = schedule(growth=growth({"at": "1M tokens"}), warmup_steps=10)
    assert [found(33 + step, [33]) for step in range(1, 68)] == [
        schedule(steps=67, warmup_steps=10)(step) for step in range(1, 68)
    ]


def test_continue_is_the_curve_of_the_ungrown_run() -> None:
    found = schedule(growth=growth({"at": "40 steps", "lr_policy": "continue"}), warmup_steps=10)
    assert [found(step, [40]) for step in range(1, 101)] == [schedule(warmup_steps=10)(step) for step in range(1, 101)]


def test_continue_with_another_peak() -> None:
    found = schedule(growth=growth({"at": "40 steps", "lr_policy": "continue", "lr": PEAK / 2}), warmup_steps=10)
    plain = schedule(warmup_steps=10)
    assert found(40, [40]) == plain(40)
    assert [found(step, [40]) for step in range(41, 101)] == pytest.approx([plain(step) / 2 for step in range(41, 101)])


def test_rates_of_base_and_stages() -> None:
    """The base has its own peak and warmup; each stage its own; without them [optimizer] and [lr_scheduler] hold."""
    stages = ({"at": "20 steps", "lr": 3e-4, "warmup_steps": 4}, {"at": "60 steps"})
    found = schedule(growth=growth(*stages, lr=1e-3, warmup_steps=5), warmup_steps=10)
    assert found(1) == pytest.approx(1e-3 / 5)
    assert found(5) == pytest.approx(1e-3)
    assert found(21, [20]) == pytest.approx(3e-4 / 4)
    assert found(24, [20]) == pytest.approx(3e-4)
    assert found(61, [20, 60]) == pytest.approx(PEAK / 10)
    assert found(70, [20, 60]) == pytest.approx(PEAK)
    assert found(20, [20, 60]) == found(20), "a later growth changes what came before it"
    zero = schedule(growth=growth({"at": "20 steps", "warmup_steps": 0}), warmup_steps=10)
    assert zero(21, [20]) == PEAK


def test_a_baseline_has_nothing_of_growth() -> None:
    section = growth({"at": "20 steps", "lr": 3e-4}, lr=1e-3, warmup_steps=5)
    off = section.model_copy(update={"enable": False})
    found = schedule(growth=off, warmup_steps=10)
    assert [found(step) for step in range(1, 101)] == [schedule(warmup_steps=10)(step) for step in range(1, 101)]


@pytest.mark.parametrize(
    ("steps", "section", "expected"),
    [
        (100, growth(), []),
        (9, growth(), [("lr_scheduler.warmup_steps", 10, 9)]),
        (10, growth(), []),
        (100, growth({"at": "95 steps"}), [("lr_scheduler.warmup_steps", 10, 5)]),
        (100, growth({"at": "95 steps", "warmup_steps": 6}), [("growth.stages.0.warmup_steps", 6, 5)]),
        (100, growth({"at": "95 steps", "warmup_steps": 5}), []),
        (100, growth({"at": "95 steps", "lr_policy": "continue"}), []),
        (100, growth({"at": "9M tokens"}), []),
        (100, growth({"at": "20 steps"}, warmup_steps=200), [("growth.base.warmup_steps", 200, 100)]),
    ],
)
def test_warmups_that_are_clamped_are_told(
    steps: int, section: GrowthConfig, expected: list[tuple[str, int, int]]
) -> None:
    found = schedule(steps=steps, growth=section, warmup_steps=10)
    found.warn_of_lengths(findings := Findings())
    message = "{} is longer than the {} steps it is for, and is cut to that"
    assert findings.warnings == [Problem(key, message.format(given, length)) for key, given, length in expected]
    factors = [found(step) / PEAK for step in range(1, steps + 1)]
    assert max(factors) == pytest.approx(1.0), "a clamped warmup still reaches the peak"


EDGES = [
    # section, growth after step, warmup of the growth -> factors of 10 steps
    pytest.param({"warmup_steps": 0, "decay_ratio": 0.0}, None, 0, [1.0] * 10, id="neither-warmup-nor-decay"),
    pytest.param({"warmup_steps": 0, "decay_ratio": 1.0}, None, 0, [1 - n / 10 for n in range(10)], id="all-decay"),
    pytest.param(
        {"warmup_steps": 2, "decay_ratio": 1.0}, None, 0, [0.5, 1.0, *(1 - n / 8 for n in range(8))], id="decay-1"
    ),
    pytest.param({"warmup_steps": 2, "decay_ratio": 0.0}, None, 0, [0.5] + [1.0] * 9, id="decay-0"),
    pytest.param({"warmup_steps": 10, "decay_ratio": 0.5}, None, 0, [n / 10 for n in range(1, 11)], id="all-warmup"),
    pytest.param(
        {"warmup_steps": 0, "decay_ratio": 0.3}, 6, 1, [1.0] * 8 + [2 / 3, 1 / 3], id="growth-on-the-last-stable-step"
    ),
    pytest.param(
        {"warmup_steps": 0, "decay_ratio": 0.3}, 7, 1, [1.0] * 7 + [1.0, 1.0, 1 / 2], id="growth-at-the-decays-start"
    ),
    pytest.param(
        {"warmup_steps": 0, "decay_ratio": 0.3}, 7, 0, [1.0] * 7 + [1.0, 2 / 3, 1 / 3], id="the-same-without-warmup"
    ),
    pytest.param(
        {"warmup_steps": 0, "decay_ratio": 0.3}, 9, 0, [1.0] * 8 + [2 / 3, 1.0], id="growth-before-the-last-step"
    ),
    pytest.param(
        {"warmup_steps": 0, "decay_ratio": 0.5, "total_steps": 8, "min_lr_factor": 0.2}, None, 0,
        [1.0] * 5 + [0.8, 0.6, 0.4, 0.2, 0.2], id="total-steps-before-the-end",
    ),
    pytest.param(
        {"warmup_steps": 0, "decay_ratio": 0.25, "total_steps": 12}, None, 0, [1.0] * 10, id="total-steps-beyond"
    ),
    pytest.param(
        {"warmup_steps": 0, "decay_ratio": 0.5, "total_steps": 6, "min_lr_factor": 0.2}, 8, 1,
        [1.0] * 4 + [0.7333333333333334, 0.4666666666666667] + [0.2] * 4, id="growth-beyond-total-steps",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("section", "at", "warmup", "expected"), EDGES)
@pytest.mark.parametrize("size", [None, 8])
def test_edges(section: dict[str, Any], at: int | None, warmup: int, expected: list[float], size: int | None) -> None:
    """In steps, and by tokens with steps of one size, which must come to the same."""
    growths = growth({"at": f"{at} steps", "warmup_steps": warmup}) if at else growth()
    found = schedule(steps=10, growth=growths, **section)
    if size:
        found = found.measured_in(BatchSizes((size, size), (0, 5)))
    curve = [found(step, [at] if at else []) / PEAK for step in range(1, 11)]
    assert curve == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, "warmup"), (1, "warmup"), (2, "stable"), (5, "stable"), (6, "warmup"), (7, "stable"), (8, "decay")],
)
def test_where_it_stands_after_a_step(step: int, expected: str) -> None:
    """A growth after step 5 with a warmup of 2 steps, and a decay of the last 3 of 10."""
    found = schedule(steps=10, growth=growth({"at": "5 steps"}), warmup_steps=2, decay_ratio=0.3)
    assert found.stands(step, [5] if step > 5 else []) == expected
    rewarm = growth({"at": "5 steps", "lr_policy": "rewarm_new", "warmup_steps": 2})
    assert schedule(steps=10, growth=rewarm, warmup_steps=2, decay_ratio=0.3).stands(step, [5]) == expected


def test_rewarm_is_the_ungrown_curve_under_a_warmup() -> None:
    section = growth({"at": "40 steps", "lr_policy": "rewarm", "warmup_steps": 10})
    grown, plain = schedule(growth=section, warmup_steps=5), schedule(warmup_steps=5)
    for step in range(1, 101):
        share = 1.0 if step <= 40 else min(1.0, (step - 40) / 10)
        assert grown(step, [40]) == pytest.approx(plain(step) * share)
        assert grown.fresh_share(step, [40]) == 1.0
    assert grown(45) == plain(45), "a growth that has not happened changes nothing"


def test_rewarm_new_leaves_the_rate_and_warms_up_what_is_new() -> None:
    section = growth(
        {"at": "20 steps", "lr_policy": "rewarm_new", "warmup_steps": 4}, {"at": "40 steps", "lr_policy": "rewarm_new"}
    )
    grown, plain = schedule(growth=section, warmup_steps=8), schedule(warmup_steps=8)
    assert [grown(step, [20, 40]) for step in range(1, 101)] == [plain(step) for step in range(1, 101)]
    shares = [grown.fresh_share(step, [20, 40]) for step in range(19, 50)]
    expected = [1, 1, 0.25, 0.5, 0.75, 1, *[1] * 16, *[n / 8 for n in range(1, 9)], 1]
    assert shares == expected


# ---- to the digit ----------------------------------------------------------------------------------------------------

WSD = {"warmup_steps": 4, "decay_ratio": 0.25}
"""Of 32 steps: 4 of warmup, 20 stable, 8 of decay."""


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # The last step of the warmup and what surrounds it, the first steps of the decay, the last step.
        (WSD, {1: 1 / 4, 3: 3 / 4, 4: 1, 5: 1, 24: 1, 25: 1, 26: 7 / 8, 32: 1 / 8}),
        ({**WSD, "min_lr_factor": 0.5}, {3: 3 / 4, 4: 1, 25: 1, 26: 15 / 16, 32: 9 / 16}),
        ({**WSD, "decay_type": "sqrt"}, {25: 1, 27: 1 / 2, 32: 1 - math.sqrt(7 / 8)}),
        ({**WSD, "decay_type": "cosine"}, {25: 1, 32: 0.5 * (1 + math.cos(math.pi * 7 / 8))}),
        ({**WSD, "warmup_steps": 0}, {1: 1, 25: 1, 26: 7 / 8, 32: 1 / 8}),
        ({**WSD, "warmup_steps": 1}, {1: 1, 2: 1, 25: 1, 26: 7 / 8, 32: 1 / 8}),
        ({**WSD, "decay_ratio": 1.0, "warmup_steps": 16}, {15: 15 / 16, 16: 1, 17: 1, 18: 15 / 16, 32: 1 / 16}),
        ({**WSD, "total_steps": 16}, {4: 1, 13: 1, 14: 3 / 4, 16: 1 / 4, 17: 0, 32: 0}),
        # The same with units.
        ({"warmup": "4 steps", "decay": "8 steps"}, {1: 1 / 4, 4: 1, 5: 1, 25: 1, 26: 7 / 8, 32: 1 / 8}),
        ({"warmup": "4 steps", "decay": "1 step"}, {4: 1, 31: 1, 32: 1}),
        ({"warmup_steps": 16, "decay": "40 steps"}, {15: 15 / 16, 16: 1, 17: 1, 18: 15 / 16, 32: 1 / 16}),
        ({**WSD, "total": "16 steps"}, {4: 1, 13: 1, 14: 3 / 4, 16: 1 / 4, 17: 0, 32: 0}),
        ({"warmup": "4 steps", "total": "64 steps", "decay": "16 steps"}, {4: 1, 32: 1, 49: 1, 50: 15 / 16}),
    ],
)
def test_to_the_digit(section: dict[str, Any], expected: dict[int, float]) -> None:
    found = LRSchedule(LRSchedulerConfig(**section), lr=1.0, steps=32, growth=GrowthConfig())
    assert {step: found(step) for step in expected} == expected
