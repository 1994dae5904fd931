"""What "auto" stands for, that it is kept, and the warning about bfloat16 where it is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.run.test_resume import recipe, saved
from titan_growth.config.loader import to_toml
from titan_growth.run import precision
from titan_growth.run.precision import Precision, decide_precision, slow_precision
from titan_growth.run.start import RunStart, Site, resolve, start_from
from titan_growth.tools.run_folder import RunFolder

AUTO = {"training__mixed_precision_param": "auto"}


def amx(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: there)


@pytest.mark.parametrize(
    ("device_type", "has_amx", "changes", "param", "reason"),
    [
        ("cuda", False, {}, "bfloat16", "CUDA"),
        ("cpu", True, {}, "bfloat16", "AMX"),
        ("cpu", False, {}, "float32", "no matrix units"),
        ("cpu", False, {"training__dtype": "bfloat16"}, "bfloat16", "training.dtype"),
        ("cpu", False, {"training__mixed_precision_param": "bfloat16"}, "bfloat16", ""),
        ("cuda", True, {"training__mixed_precision_param": "float32"}, "float32", ""),
    ],
)
def test_auto_is_what_the_device_does_fast(
    device_type: str, has_amx: bool, changes: dict[str, Any], param: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    amx(monkeypatch, has_amx)
    decided = decide_precision(recipe(**{**AUTO, **changes}).training, device_type, None)
    assert decided.param == param
    assert reason in decided.reason
    assert bool(reason) == bool(decided.reason)


def test_auto_is_decided_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the folder before the first checkpoint, and by the checkpoint after it; also on another device."""
    amx(monkeypatch, False)
    folder = RunFolder(tmp_path)
    folder.create()
    asked = recipe(**AUTO)
    first = resolve(asked, Site(folder, 1, "cpu"))
    assert isinstance(first, RunStart)
    assert first.plan.recipe.training.mixed_precision_param == "float32"
    caplog.set_level("INFO", logger="titan_growth")
    first.log()
    assert any('"auto" is float32: this CPU has no matrix units' in line for line in caplog.messages)
    folder.write_text("recipe.toml", to_toml(first.plan.recipe))
    amx(monkeypatch, True)
    again = resolve(asked, Site(folder, 1, "cuda"))
    assert isinstance(again, RunStart)
    assert again.plan.recipe.training.mixed_precision_param == "float32"
    assert again.precision.reason == "decided at an earlier start"
    other = resolve(recipe(**AUTO, training__dtype="bfloat16"), Site(folder, 1, "cpu"))
    assert isinstance(other, RunStart), "nothing is saved yet, so the type of the parameters may still change"
    assert other.plan.recipe.training.mixed_precision_param == "bfloat16", "float32 over bfloat16 is refused"
    checkpoint = saved(tmp_path, recipe(training__mixed_precision_param="bfloat16"))
    resumed = start_from(checkpoint, asked, Site(folder, 2, "cpu"))
    assert resumed.plan.recipe.training.mixed_precision_param == "bfloat16"
    assert not any("mixed_precision_param" in line for line in resumed.changes)


def test_bfloat16_where_it_is_slow_gets_one_warning_with_both_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    amx(monkeypatch, False)
    rates = {torch.bfloat16: 155e9, torch.float32: 285e9}
    monkeypatch.setattr(precision, "peak_flops_per_second", lambda kind, name, dtype: (rates[dtype], ""))
    slow = recipe(training__mixed_precision_param="bfloat16").training
    warning = str(slow_precision(slow, "cpu", Precision("bfloat16")))
    assert warning == (
        "training.mixed_precision_param: bfloat16 products are slower on this CPU (155 GFLOP/s against 285 GFLOP/s in "
        'float32). Set it to "auto" for new runs'
    )
    assert (
        slow_precision(recipe(training__mixed_precision_param="float32").training, "cpu", Precision("bfloat16")) is None
    )
    assert slow_precision(slow, "cuda", Precision("bfloat16")) is None
    rates[torch.bfloat16] = 300e9
    assert slow_precision(slow, "cpu", Precision("bfloat16")) is None
    amx(monkeypatch, True)
    rates[torch.bfloat16] = 1e9
    assert slow_precision(slow, "cpu", Precision("bfloat16")) is None, "with matrix units nothing is measured"
    amx(monkeypatch, False)
    assert slow_precision(slow, "cpu", Precision("bfloat16", "decided at an earlier start")) is None, "it is auto"
