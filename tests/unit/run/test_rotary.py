"""Which runs scale their rotary frequencies: new ones with long sequences, and those that always have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hugging_face import make_folder
from tests.unit.interchange.test_folders import SCALED
from tests.unit.run.test_resume import recipe, saved
from titan_growth.config.loader import to_toml
from titan_growth.run.resume import compare
from titan_growth.run.start import RunStart, Site, resolve, start_from
from titan_growth.tools.run_folder import RunFolder

ORIGINAL = {"model__rope_original_max_seq_len": 32}


def started(folder: Path, **changes: Any) -> RunStart:
    start = resolve(recipe(**changes), Site(RunFolder(folder), 1, "cpu"))
    assert isinstance(start, RunStart)
    return start


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 1.0),
        ({"training__seq_len": 8191, "training__global_batch_size": 1}, 1.0),
        ({"training__seq_len": 8192, "training__global_batch_size": 1}, 8.0),
        ({"validation__seq_len": 8192}, 8.0),
        ({"growth__stages": [{"at": "10 steps", "factor": 2, "seq_len": 8192}]}, 8.0),
        ({"model__rope_scaling_factor": 4.0}, 4.0),
        ({"model__rope_scaling_factor": 1.0}, 1.0),
        # whoever says how to scale wants to
        (ORIGINAL, 8.0),
        ({"model__rope_low_freq_factor": 2.0}, 8.0),
        ({"model__name": "qwen3"}, 1.0),
    ],
    ids=str,
)
def test_a_new_run_scales_where_its_sequences_are_long(changes: dict[str, Any], factor: float, tmp_path: Path) -> None:
    start = started(tmp_path, training__local_batch_size=1, **changes)
    assert {phase.config.rope_scaling_factor for phase in start.plan.phases} == {factor}
    flavor_decided = factor != 1.0 or changes.get("model__rope_scaling_factor") or "model__name" in changes
    assert bool(start.rope_scaling.reason) == (not flavor_decided)


def test_the_decision_is_said_stored_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = started(tmp_path)
    caplog.set_level("INFO", logger="titan_growth")
    first.log()
    assert [line for line in caplog.messages if "rope" in line] == [
        "model.rope_scaling_factor is 1: no sequence is longer than 64 tokens, and it is for models of 8,192 or more "
        "(torchtitan scales by 8)"
    ]
    assert "rope_scaling_factor = 1.0" in to_toml(first.plan.recipe)
    checkpoint = saved(tmp_path, first.plan.recipe)
    again = start_from(checkpoint, recipe(validation__seq_len=8192), Site(RunFolder(tmp_path), 1, "cpu"))
    assert again.plan.target == first.plan.target
    assert not any("rope" in line for line in again.changes)


def test_a_run_of_an_older_version_goes_on_as_it_was(tmp_path: Path) -> None:
    """Its stored recipe has no factor: then the flavor alone decided, which was to scale."""
    checkpoint = saved(tmp_path, recipe())
    again = start_from(checkpoint, recipe(), Site(RunFolder(tmp_path), 1, "cpu"))
    assert again.plan.target.rope_scaling_factor == 8.0
    assert not again.rope_scaling.reason
    off, _ = compare(checkpoint, recipe(model__rope_scaling_factor=1.0))
    assert [problem.key for problem in off] == ["model (rope_scaling_factor)"]


def test_weights_from_elsewhere_keep_what_they_were_trained_with(tmp_path: Path) -> None:
    """A folder that says; a checkpoint of this program; one of another, which is taken for torchtitan's."""
    scaled, plain = make_folder(tmp_path / "scaled", rope_scaling=SCALED), make_folder(tmp_path / "plain")
    own = saved(tmp_path / "run", recipe(model__rope_scaling_factor=1.0)).path
    older = saved(tmp_path / "older", recipe()).path
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".metadata").write_bytes(b"")
    for place, factor in ((scaled, 8.0), (plain, 1.0), (own, 1.0), (older, 8.0), (tmp_path / "other", 8.0)):
        start = started(tmp_path / "new", checkpoint__initial_load_path=str(place))
        assert start.plan.target.rope_scaling_factor == factor, place
        assert ("was trained with" in start.rope_scaling.reason) == (factor == 1.0)
