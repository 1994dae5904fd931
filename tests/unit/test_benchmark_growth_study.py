"""The growth study asks for runs that can be had, and knows a run by what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.growth_study_runs import GROWN, RECIPE, SCRATCH, Choice, Trunk
from benchmarks.growth_study_tables import trunks
from benchmarks.growth_study_tuning import GRID, Tuning, tuning_trunk
from titan_growth.config.loader import inspect_recipe
from titan_growth.run.start import RunStart, Site, resolve
from titan_growth.tools.findings import Findings
from titan_growth.tools.run_folder import RunFolder

BEST = {SCRATCH: Choice(8e-3, "small"), GROWN: Choice(4e-3, "small", 2.0, 200)}


def ends_of(wanted: list[Trunk]) -> list[dict[str, Any]]:
    """What the file holds of these trunks when the choices of `BEST` do best of all."""
    good = {tuning_trunk(choice, seed).key(1000) for choice in BEST.values() for seed in (1, 2, 3)}
    keys = [trunk.key(end) for trunk in wanted for end in trunk.ends]
    near = tuning_trunk(Choice(4e-3, "small", 2.0)).key(1000)
    return [{"key": key, "loss": 2.0 if key in good else 2.5 if key == near else 3.0} for key in keys]


def tuning_ends() -> list[dict[str, Any]]:
    """What it holds after the whole tuning."""
    ends: list[dict[str, Any]] = []
    for _ in range(3):
        ends = ends_of(Tuning.of(ends).trunks())
    return ends


def test_each_round_of_the_tuning_waits_for_the_one_before() -> None:
    """The grid; warmups of its best; seeds of the best two. Nothing else is trained before the last round has been."""
    rounds, ends = [], list[dict[str, Any]]()
    for _ in range(3):
        wanted = Tuning.of(ends).trunks()
        assert trunks(ends) == wanted
        rounds.append(len(wanted))
        ends = ends_of(wanted)
        assert Tuning.of(ends[1:]).winners() is None
    assert rounds == [len(GRID), len(GRID) + 4, len(GRID) + 4 + 8]
    assert Tuning.of(ends).winners() == BEST


@pytest.mark.parametrize("number", range(len(trunks(tuning_ends()))))
def test_every_trunk_can_be_trained(number: int) -> None:
    """Without a problem or a warning, but for the law's own: it is far from the sizes that it was fitted to."""
    trunk = trunks(tuning_ends())[number]
    end = trunk.ends[-1]
    length = ("--training.steps", str(end if trunk.is_whole else trunk.stems[-1]))
    decay = () if trunk.is_whole else ("--lr_scheduler.decay_ratio", "0")
    words = ["--job.config_file", str(RECIPE), *length, *decay, *trunk.words]
    recipe = inspect_recipe(words, found := Findings())
    assert recipe is not None, found.problems
    start = resolve(recipe, Site(RunFolder("a folder that is not there"), 1, "cpu"))
    assert isinstance(start, RunStart)
    told = [str(problem) for problem in [*found.problems, *found.warnings, *start.warnings]]
    assert [text for text in told if "the law was fitted to models of" not in text] == []
    assert 0 < trunk.flops_left([]) <= trunk.flops_of(end) * len(trunk.ends)
    assert all(stem % trunk.interval == 0 for stem in trunk.stems)


def test_a_run_is_known_by_its_words_its_seed_and_its_end() -> None:
    """Arms and studies are names: the same run in two tables is trained once."""
    one = tuning_trunk(BEST[GROWN])
    same, other = replace(one, study="another", arm="another"), replace(one, seed=2)
    (end,) = one.ends
    assert same.key(end) == one.key(end)
    assert len({one.key(end), other.key(end), one.key(end + 5), replace(one, words=()).key(end)}) == 4
