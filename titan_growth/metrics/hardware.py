"""What the device can do: its peak FLOPs per second and the memory in use.

Model FLOPs utilisation (MFU) divides what the model needed by what the hardware could have done in that time, so it is
only as honest as the peak it divides by. For data-centre GPUs that is the vendor's dense bf16 figure (no sparsity),
found by device name. For everything else, a CPU above all, no such figure is worth trusting: cores are shared, clocks
move, and the thread count is a choice of this process. There we measure a matrix multiplication, which is the bulk of
training anyway, and say so next to the number.
"""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_growth.metrics.formatting import format_rate

if TYPE_CHECKING:
    import torch

GIB = 1024**3

_MEASURE_SECONDS = 0.25
"""Budget of a measurement after its warm-up. Nothing is begun that would not fit, so all of it stays under 0.4 s."""

_LONG_ENOUGH_SECONDS = 0.02
"""A multiplication this long is large enough: launch and threading overheads no longer count."""

# Dense peaks in FLOP/s, first match wins: the narrower names come first. A word boundary on both sides keeps "GH200",
# "A100X" and the like (other chips with other peaks) from matching.
_PEAKS: list[tuple[str, float, str]] = [
    (r"\bH100\b.*\bPCIe\b", 756e12, "bf16"),
    (r"\bH100\b.*\bNVL\b", 835e12, "bf16"),
    (r"\bH100\b", 989e12, "bf16"),
    (r"\bH200\b.*\bNVL\b", 835e12, "bf16"),
    (r"\bH200\b", 989e12, "bf16"),
    (r"\bB200\b", 2250e12, "bf16"),
    (r"\bA100\b", 312e12, "bf16"),
    (r"\bL40S\b", 362e12, "bf16"),
    (r"\bV100\b", 125e12, "fp16"),  # this generation has no bf16 units
    (r"\bMI300X\b", 1300e12, "bf16"),
    (r"\bMI250X\b", 191.5e12, "bf16"),  # one of the card's two dies: each is a device of its own to PyTorch
]


def peak_flops_per_second(device_type: str, device_name: str, dtype: torch.dtype) -> tuple[float, str]:
    """Peak of one device in FLOP/s, and a sentence saying where the number comes from.

    A GPU of the table gets its dense bf16 (V100: fp16) peak whatever `dtype` is, which is how MFU is usually quoted.
    Any other device is measured with a matrix multiplication in `dtype`, which takes less than half a second, leaves
    PyTorch's random state alone, and uses as many threads as the process has.

    Args:
        device_type: `cpu`, `cuda`, ...; a measurement runs on the current device of that type.
        device_name: what `torch.cuda.get_device_name()` says; any text for a CPU.
        dtype: the type that the run's matrix multiplications are done in.
    """
    # A MIG slice carries the full card's name but only a part of its units, so the table would be wrong for it.
    if device_type != "cpu" and not re.search(r"\bMIG\b", device_name):
        for pattern, peak, kind in _PEAKS:
            if re.search(pattern, device_name, re.IGNORECASE):
                return peak, f"dense {kind} peak of {device_name} {format_rate(peak)}"
    peak = _measured_matmul_rate(device_type, dtype)
    return peak, f"measured {_short_name(dtype)} matmul peak of this process {format_rate(peak)}"


def _short_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def _measured_matmul_rate(device_type: str, dtype: torch.dtype) -> float:
    """Best FLOP/s of square multiplications, growing until one is long enough, then repeated while time is left."""
    import torch

    synchronize = torch.get_device_module(device_type).synchronize

    def operand(size: int) -> torch.Tensor:
        # Varied small values, without touching the random state that the run's reproducibility hangs on. Constant
        # operands would flatter GPUs, whose clocks depend on how many bits flip.
        ramp = torch.arange(size * size, device=device_type, dtype=torch.int32).remainder_(1009)
        return ramp.to(torch.float32).div_(1009.0).sub_(0.5).to(dtype).reshape(size, size)

    size = 256
    left = operand(size)
    product = left @ left  # warm-up: starts thread pools and loads kernels, which is not the hardware's speed
    synchronize()
    deadline = time.perf_counter() + _MEASURE_SECONDS
    best_rate = 0.0
    best_seconds = math.inf  # at this size; on a busy machine a single repetition says little
    while True:
        begin = time.perf_counter()
        torch.mm(left, left, out=product)
        synchronize()
        end = time.perf_counter()
        best_seconds = min(best_seconds, max(end - begin, 1e-9))
        best_rate = max(best_rate, 2.0 * size**3 / best_seconds)
        # Twice the size is 8 times the work, and as much again for making the operand and a cold first pass.
        if best_seconds < _LONG_ENOUGH_SECONDS and 16.0 * best_seconds < deadline - end and size < 8192:
            size, best_seconds = 2 * size, math.inf
            left = operand(size)
            product = torch.empty_like(left)
        elif best_seconds > deadline - end:
            return best_rate


def memory_gib(device_type: str) -> tuple[float, float]:
    """Memory of this process in GiB: in use now, and the most that was in use since it started.

    On CUDA that is the active memory of the current device's allocator; on a CPU it is resident memory.
    """
    if device_type == "cuda":
        import torch

        stats: dict[str, Any] = torch.cuda.memory_stats()
        return stats.get("active_bytes.all.current", 0) / GIB, stats.get("active_bytes.all.peak", 0) / GIB
    return _resident_gib()


def _resident_gib() -> tuple[float, float]:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return _resident_gib_without_proc()
    # VmHWM rather than getrusage's maximum: the latter survives exec, so a small worker started by a large launcher
    # would report the launcher's peak.
    kib = {key: int(value) for key, value in re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", status, re.MULTILINE)}
    current = kib.get("VmRSS", 0) * 1024 / GIB
    return current, max(current, kib.get("VmHWM", 0) * 1024 / GIB)


def _resident_gib_without_proc() -> tuple[float, float]:
    import resource
    import sys

    # Without /proc only the peak is known; it stands in for both. macOS counts bytes, the other systems KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return peak, peak
