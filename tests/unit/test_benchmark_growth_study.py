"""The growth study asks for runs that can be had, and knows a run by what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth_study
from benchmarks.growth_study_results import append_result, read_results
from benchmarks.growth_study_runs import GROWN, SCALES, SCRATCH, Choice, Scale
from benchmarks.growth_study_tables import trunks
from benchmarks.growth_study_tuning import Tuning
from titan_growth.config.loader import inspect_recipe
from titan_growth.metrics.records import GrowthRecord
from titan_growth.run.start import RunStart, Site, resolve
from titan_growth.tools.findings import Findings
from titan_growth.tools.run_folder import RunFolder

CPU = SCALES["cpu"]
BEST = {SCRATCH: Choice(2e-3, "small"), GROWN: Choice(4e-3, "small", 2.0, 200)}


def ends_of(tuning: Tuning) -> list[dict[str, Any]]:
    """What the file holds of the rounds that can be trained when the choices of `BEST` do best of all."""
    good = {tuning.trunk(choice, seed).key(1000) for choice in BEST.values() for seed in (1, 2, 3)}
    near = tuning.trunk(Choice(4e-3, "small", 2.0)).key(1000)
    keys = [trunk.key(end) for trunk in tuning.trunks() for end in trunk.ends]
    return [{"key": key, "loss": 2.0 if key in good else 2.5 if key == near else 3.0} for key in keys]


def tuning_ends(scale: Scale) -> list[dict[str, Any]]:
    """What it holds after the whole tuning."""
    ends: list[dict[str, Any]] = []
    for _ in range(3):
        ends = ends_of(Tuning.of(ends, scale))
    return ends


def test_each_round_of_the_tuning_waits_for_the_one_before() -> None:
    """The grid; warmups of its best; seeds of the best two. Nothing else is trained before the last round has been."""
    rounds, ends = [], list[dict[str, Any]]()
    for _ in range(3):
        tuning = Tuning.of(ends, CPU)
        assert trunks(ends, CPU) == tuning.trunks()
        rounds.append(len(tuning.trunks()))
        ends = ends_of(tuning)
        assert Tuning.of(ends[1:], CPU).winners() is None
    assert rounds == [24, 24 + 4, 24 + 4 + 8]
    assert Tuning.of(ends, CPU).winners() == BEST


@pytest.mark.parametrize("device", SCALES)
def test_every_trunk_can_be_trained(device: str) -> None:
    """Without a problem or a warning, but for the law's own: it is far from the sizes that it was fitted to."""
    for trunk in trunks(tuning_ends(SCALES[device]), SCALES[device]):
        end = trunk.ends[-1]
        length = ("--training.steps", str(end if trunk.is_whole else trunk.stems[-1]))
        decay = () if trunk.is_whole else ("--lr_scheduler.decay_ratio", "0")
        words = ["--job.config_file", str(trunk.scale.recipe), *length, *decay, *trunk.words]
        recipe = inspect_recipe(words, found := Findings())
        assert recipe is not None, found.problems
        start = resolve(recipe, Site(RunFolder("a folder that is not there"), 1, device))
        assert isinstance(start, RunStart)
        told = [str(problem) for problem in [*found.problems, *found.warnings, *start.warnings]]
        assert [text for text in told if "the law was fitted to models of" not in text] == [], trunk.arm
        assert 0 < trunk.flops_left([]) <= trunk.flops_of(end) * len(trunk.ends)
        assert all(stem % trunk.interval == 0 for stem in trunk.stems)


def test_a_run_is_known_by_its_words_its_seed_its_end_and_its_scale() -> None:
    """Arms and studies are names: the same run in two tables is trained once."""
    one = Tuning.of([], CPU).trunk(BEST[GROWN])
    same, other = replace(one, study="another", arm="another"), replace(one, seed=2)
    (end,) = one.ends
    assert same.key(end) == one.key(end)
    larger = replace(one, scale=SCALES["cuda"])
    assert len({one.key(end), other.key(end), one.key(end + 5), replace(one, words=()).key(end), larger.key(end)}) == 5


def test_results_are_kept_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert read_results(path) == {"ends": [], "repeats": []}
    append_result(path, "ends", {"key": "a"})
    append_result(path, "repeats", {"key": "a"})
    append_result(path, "ends", {"key": "b"})
    assert read_results(path) == {"ends": [{"key": "a"}, {"key": "b"}], "repeats": [{"key": "a"}]}


def test_the_study_of_gpus_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit, match="no GPU that torch can use"):
        growth_study.main(["--device", "cuda"])


def test_losses_around_a_growth_are_kept(tmp_path: Path) -> None:
    """From the lines that a run writes: 100 steps before it and 400 after."""
    growth = GrowthRecord(step=500, from_layers=3, to_layers=12, loss_before=3.0, loss_after=3.5)
    lines = [json.dumps({"step": step, "loss": 3.0 + step / 1000}) for step in range(10, 1001, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, growth.to_line()]) + "\n")
    (found,) = growth_study.around_growths(tmp_path)
    assert (found["step"], found["to_layers"]) == (500, 12)
    assert found["losses"][0] == [400, 3.4]
    assert found["losses"][-1] == [900, 3.9]
