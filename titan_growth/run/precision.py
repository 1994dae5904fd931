"""The type of the computation: what `training.mixed_precision_param = "auto"` stands for, and whether it pays.

bfloat16 is fast where the device has matrix units for it: CUDA, and CPUs with AMX. On other CPUs a bfloat16 product
takes up to twice as long as a float32 one, so there "auto" is float32. It is decided once, at a run's first start, and
kept on resume: another type would be another computation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from titan_growth.config.schema.recipe import TrainingConfig
from titan_growth.metrics.formatting import format_rate
from titan_growth.metrics.hardware import peak_flops_per_second
from titan_growth.tools.errors import Problem
from titan_growth.tools.torch_private import has_amx

KEY = "training.mixed_precision_param"


@dataclass(frozen=True)
class Precision:
    """A type of the computation, and why it was chosen."""

    param: str
    """Of torch's types: "bfloat16" or "float32"."""
    reason: str = ""
    """Empty when the recipe names the type itself."""

    def __str__(self) -> str:
        return f'{KEY} = "auto" is {self.param}: {self.reason}'


def decide_precision(training: TrainingConfig, device_type: str, before: TrainingConfig | None) -> Precision:
    """The type of the computation of a run.

    Args:
        before: the section as it was decided at an earlier start.
    """
    if training.mixed_precision_param != "auto":
        return Precision(training.mixed_precision_param)
    if training.dtype == "bfloat16":
        return Precision("bfloat16", "the parameters are bfloat16 (training.dtype)")
    if before is not None and before.mixed_precision_param != "auto":
        return Precision(before.mixed_precision_param, "decided at an earlier start")
    if device_type != "cpu":
        return Precision("bfloat16", "CUDA devices have matrix units for it")
    if has_amx():
        return Precision("bfloat16", "this CPU has matrix units for it (AMX)")
    return Precision("float32", "this CPU has no matrix units for bfloat16 (AMX)")


def slow_precision(training: TrainingConfig, device_type: str, decided: Precision) -> Problem | None:
    """A warning when bfloat16 is slower here than float32, with both rates; takes a second on a CPU without AMX."""
    if decided.reason or device_type != "cpu" or training.mixed_precision_param != "bfloat16" or has_amx():
        return None
    bfloat16, float32 = (peak_flops_per_second("cpu", "", dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    if bfloat16 >= float32:
        return None
    rates = f"{format_rate(bfloat16)} against {format_rate(float32)} in float32"
    return Problem(KEY, f"bfloat16 products are slower on this CPU ({rates})", 'Set it to "auto" for new runs')
