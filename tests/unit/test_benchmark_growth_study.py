"""The growth study asks for runs that can be had, and knows a run by what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.growth_study_runs import GRID, GROWN, RECIPE, SCRATCH, Choice, tuned, tuning
from benchmarks.growth_study_tables import trunks
from titan_growth.config.loader import inspect_recipe
from titan_growth.run.start import RunStart, Site, resolve
from titan_growth.tools.findings import Findings
from titan_growth.tools.run_folder import RunFolder

BEST = {SCRATCH: Choice(8e-3, "small"), GROWN: Choice(4e-3, "small", 2.0)}


def tuning_ends(best: dict[str, Choice]) -> list[dict[str, Any]]:
    """What the file holds after a tuning that the given choices won."""
    ends = []
    for trunk, choice in zip(tuning(), GRID, strict=True):
        loss = 2.0 if choice in best.values() else 3.0
        ends += [{"key": trunk.key(end), "loss": loss} for end in trunk.ends]
    return ends


def test_the_winners_of_the_tuning_are_what_the_rest_trains() -> None:
    """Nothing else is trained before all of the tuning has been."""
    ends = tuning_ends(BEST)
    assert tuned(ends) == BEST
    assert tuned(ends[1:]) is None
    assert [trunk.study for trunk in trunks(ends[1:])] == ["tuning"] * len(GRID)


@pytest.mark.parametrize("number", range(len(trunks(tuning_ends(BEST)))))
def test_every_trunk_can_be_trained(number: int) -> None:
    """Without a problem or a warning, but for the law's own: it is far from the sizes that it was fitted to."""
    trunk = trunks(tuning_ends(BEST))[number]
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
    one = next(tuning())
    same, other = replace(one, study="another", arm="another"), replace(one, seed=2)
    (end,) = one.ends
    assert same.key(end) == one.key(end)
    assert len({one.key(end), other.key(end), one.key(end + 5), replace(one, words=()).key(end)}) == 4
