"""The page of the growth study says what its JSON says, and reckons speedups as the paper does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.testing.compare import compare_images

from benchmarks import growth_study_page
from benchmarks.growth_study_frontier import side_of, speedup
from benchmarks.growth_study_page import page, write_page
from benchmarks.growth_study_results import read_results
from benchmarks.growth_study_runs import SCALES, SCRATCH
from benchmarks.growth_study_spikes import spikes
from benchmarks.growth_study_tables import trunks
from tests.unit.test_benchmark_growth_study import CPU, tuning_ends

FLOPS_PER_TOKEN = 100.0


def law(flops: float) -> float:
    """Loss of a run from scratch: a straight line over the logarithm."""
    return 4.0 - 0.2 * math.log2(flops)


def scratch(end: int) -> dict[str, Any]:
    return {"end": end, "tokens": end, "flops": end * FLOPS_PER_TOKEN, "loss": law(end * FLOPS_PER_TOKEN)}


def test_a_speedup_is_the_distance_along_the_costs_and_the_product_of_two_factors() -> None:
    """Grown at half of its tokens from a base of 0.3 of the FLOPs, and 5 % worse in tokens than from scratch."""
    side = side_of(SCRATCH, [scratch(end) for end in (1000, 2000, 4000)])
    assert side is not None
    flops = 0.5 * (1 + 0.3) * 3000 * FLOPS_PER_TOKEN
    grown = {"end": 3000, "tokens": 3000, "flops": flops, "loss": law(0.95 * 3000 * FLOPS_PER_TOKEN)}
    found = speedup(side, grown)
    assert found.flops == pytest.approx(0.95 / 0.65)
    assert found.by_line == pytest.approx(found.flops)
    assert found.tokens == pytest.approx(0.95)
    assert found.cheaper == pytest.approx(1 / (1 - (1 - 0.3) * 0.5))
    assert not found.extrapolated
    assert speedup(side, {**grown, "loss": law(4100 * FLOPS_PER_TOKEN)}).extrapolated


def test_a_side_needs_two_budgets() -> None:
    assert side_of(SCRATCH, [scratch(1000), scratch(1000)]) is None


def test_a_spike_is_measured_from_the_mean_before_it() -> None:
    """Logged every 10 steps: 3.0 before, 3.5 right after, back at 2.9 from step 60 on; means of 5 are back later."""
    before = [[step, 3.0] for step in range(-40, 1, 10)]
    after = [[10, 3.5]] + [[step, 3.1] for step in range(20, 60, 10)] + [[step, 2.9] for step in range(60, 200, 10)]
    entry = {"arm": "stack", "end": 100, "tokens": 100 * 4096, "growths": [{"step": 0, "losses": before + after}]}
    # The means of five: 10..50 3.18, ..60 3.06, ..70 3.02, ..80 2.98.
    assert f"| stack, step 0 | 3.000 | 3.500 | +0.500 | {80 * 4096:,} tokens |" in spikes([entry])[1]


def all_ends() -> list[dict[str, Any]]:
    """An end of every trunk; those of the tuning as its test has them."""
    tuned = {entry["key"]: entry["loss"] for entry in tuning_ends(CPU)}
    ends = {}
    for trunk in trunks(tuning_ends(CPU), CPU):
        for end in trunk.ends:
            flops = trunk.flops_of(end)
            ends[trunk.key(end)] = {
                "key": trunk.key(end), "study": trunk.study, "arm": trunk.arm, "seed": trunk.seed, "end": end,
                "loss": tuned.get(trunk.key(end), 3.0 - 0.3 * math.log2(end / 1000)), "tokens": 4096 * end,
                "flops": flops, "seconds": flops / 5e10, "growths": [], "machine": "a machine",
            }  # fmt: skip
    return list(ends.values())


def test_all_tables_and_pictures(tmp_path: Path) -> None:
    """Each study has its heading and a row for every arm, the repeated runs their losses twice."""
    ends = all_ends()
    repeats = [one for one in ends if one["study"] == "headline" and one["end"] == 4000 and one["seed"] == 1]
    write_page({"ends": ends, "repeats": repeats}, CPU, tmp_path)
    text = (tmp_path / "growth_study.md").read_text()
    for trunk in trunks(ends, CPU):
        assert f"| {trunk.arm} |" in text
    for title in growth_study_page.TITLES.values():
        assert f"## {title}\n" in text
    assert "are trained." not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"growth_study.png", "growth_study_timing.png"}
    assert "seed 1, the loss of the grown run takes" in text


def test_a_part_of_the_study_is_called_a_part() -> None:
    assert "1 of 24 ends are trained." in page({"ends": all_ends()[:1], "repeats": []}, CPU)


@pytest.mark.parametrize("device", SCALES)
def test_the_committed_page_is_made_of_the_committed_results(device: str, tmp_path: Path) -> None:
    """Text to the letter; pictures as far as another version of the fonts may differ. No results, no page."""
    scale = SCALES[device]
    if scale.result.exists():
        write_page(read_results(scale.result), scale, tmp_path)
    folder, made = scale.result.parent, {path.name for path in tmp_path.iterdir()}
    stem = scale.result.stem
    assert made == {
        path.name for path in folder.iterdir() if path.name in (f"{stem}.md", f"{stem}.png", f"{stem}_timing.png")
    }
    for name in made:
        if name.endswith(".md"):
            assert (tmp_path / name).read_text() == (folder / name).read_text()
        else:
            assert compare_images(str(folder / name), str(tmp_path / name), tol=5) is None
