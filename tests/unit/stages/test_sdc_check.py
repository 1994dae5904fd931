"""The SDC check before anything runs, and the bits that it compares. What it finds: tests/distributed."""

from __future__ import annotations

import math

import pytest
import torch

from tests.runs import BASE, argv_of
from titan_growth.config.loader import load_recipe
from titan_growth.run.plan import plan_run, stage_lines
from titan_growth.tools.bits import differ, fingerprint
from titan_growth.tools.findings import Findings

ON = {**BASE, "training.steps": 200, "debug.sdc_check_interval": 100}


def planned(device_type: str, **debug: object) -> tuple[list[str], Findings]:
    recipe = load_recipe(argv_of({**ON, **{f"debug.{key}": value for key, value in debug.items()}}))
    plan = plan_run(recipe, found := Findings(), num_ranks=1, device_type=device_type)
    return (stage_lines(plan.phase, device_type) if plan else []), found


def test_on_cuda_it_needs_deterministic_kernels() -> None:
    lines, found = planned("cuda")
    assert lines == []
    assert [str(problem) for problem in found.problems] == [
        "debug.sdc_check_interval: needs debug.deterministic = true on CUDA, where some kernels give other bits each "
        "time otherwise. Set it, or sdc_check_interval = 0"
    ]
    lines, found = planned("cuda", deterministic=True)
    assert "  sdc_check: every 100 steps a microbatch is run twice; another bit stops the run" in lines
    assert found.warnings == []
    _, found = planned("cuda", deterministic=True, deterministic_warn_only=True)
    assert [problem.key for problem in found.warnings] == ["debug.deterministic_warn_only"]


def test_on_a_cpu_it_needs_nothing() -> None:
    lines, found = planned("cpu", sdc_check_action="warn")
    assert "  sdc_check: every 100 steps a microbatch is run twice; another bit is warned about" in lines
    assert (found.problems, found.warnings) == ([], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits(dtype: torch.dtype) -> None:
    """NaN is itself, and 0 is not -0; tensors need not be contiguous."""
    one = torch.tensor([[1.0, math.nan], [0.0, math.inf]], dtype=dtype)
    other = one.clone()
    assert not differ(one.T, other.T)
    assert fingerprint(one.T) == fingerprint(other)
    other[1, 0] = -0.0
    assert differ(one.T, other.T)
    assert fingerprint(one) != fingerprint(other)
    assert not differ(one[:0], other[:0])


def test_it_is_said_when_no_step_is_checked() -> None:
    recipe = load_recipe(argv_of({**ON, "training.steps": 99}))
    plan_run(recipe, found := Findings(), num_ranks=1, device_type="cpu")
    assert [str(problem) for problem in found.warnings] == [
        "debug.sdc_check_interval: 100 is more than training.steps 99: nothing is checked"
    ]
