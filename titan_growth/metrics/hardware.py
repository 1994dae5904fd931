"""What the device can do: its peak FLOPs per second and the memory in use.

Model FLOPs utilisation (MFU) is only as honest as the peak it divides by. For data-centre GPUs that is the vendor's
dense bf16 figure (no sparsity), looked up by device name. For everything else, CPUs above all, no published figure can
be trusted: cores are shared, clocks vary, and the thread count is this process's choice. There we time a matrix
multiplication, the bulk of training, and say so next to the number.
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
"""Time budget after warm-up. No repetition starts that would not fit, so the whole stays under 0.4 s."""

_LONG_ENOUGH_SECONDS = 0.02
"""A multiplication this long is large enough to hide launch and threading overheads."""

# Dense peaks in FLOP/s. First match wins, so narrower names come first. Word boundaries keep other chips ("GH200",
# "A100X") from matching.
_PEAKS: list[tuple[str, float, str]] = [
    (r"\bH100\b.*\bPCIe\b", 756e12, "bf16"),
    (r"\bH100\b.*\bNVL\b", 835e12, "bf16"),
    (r"\bH100\b", 989e12, "bf16"),
    (r"\bH200\b.*\bNVL\b", 835e12, "bf16"),
    (r"\bH200\b", 989e12, "bf16"),
    (r"\bB200\b", 2250e12, "bf16"),
    (r"\bA100\b", 312e12, "bf16"),
    (r"\bL40S\b", 362e12, "bf16"),
    (r"\bV100\b", 125e12, "fp16"),  # no bf16 units
    (r"\bMI300X\b", 1300e12, "bf16"),
    (r"\bMI250X\b", 191.5e12, "bf16"),  # one of the card's two dies; PyTorch sees each as a device
]


def peak_flops_per_second(device_type: str, device_name: str, dtype: torch.dtype) -> tuple[float, str]:
    """Peak of one device in FLOP/s, and where the number comes from.

    A known GPU gets its dense bf16 (V100: fp16) peak whatever `dtype` is, which is how MFU is usually quoted. Any other
    device is measured with a matrix multiplication in `dtype`: under half a second, with the process's threads, and
    without touching PyTorch's random state.

    Args:
        device_type: `cpu`, `cuda`, ...; a measurement runs on the current device of that type.
        device_name: from `torch.cuda.get_device_name()`; any text for a CPU.
        dtype: of the run's matrix multiplications.
    """
    # A MIG slice has the full card's name but only part of its units.
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
    """Best FLOP/s of square multiplications: grow until one is long enough, then repeat while time is left."""
    import torch

    synchronize = torch.get_device_module(device_type).synchronize

    def operand(size: int) -> torch.Tensor:
        # Varied small values without the random state, which the run's reproducibility depends on. Constant operands
        # would flatter GPUs, whose clocks depend on how many bits flip.
        ramp = torch.arange(size * size, device=device_type, dtype=torch.int32).remainder_(1009)
        return ramp.to(torch.float32).div_(1009.0).sub_(0.5).to(dtype).reshape(size, size)

    size = 256
    left = operand(size)
    product = left @ left  # warm-up: thread pools, kernel loading
    synchronize()
    deadline = time.perf_counter() + _MEASURE_SECONDS
    best_rate = 0.0
    best_seconds = math.inf  # at this size; one repetition says little on a busy machine
    while True:
        begin = time.perf_counter()
        torch.mm(left, left, out=product)
        synchronize()
        end = time.perf_counter()
        best_seconds = min(best_seconds, max(end - begin, 1e-9))
        best_rate = max(best_rate, 2.0 * size**3 / best_seconds)
        # Twice the size is 8 times the work, doubled for making the operand and a cold first pass.
        if best_seconds < _LONG_ENOUGH_SECONDS and 16.0 * best_seconds < deadline - end and size < 8192:
            size, best_seconds = 2 * size, math.inf
            left = operand(size)
            product = torch.empty_like(left)
        elif best_seconds > deadline - end:
            return best_rate


def memory_gib(device_type: str) -> tuple[float, float]:
    """Memory of this process in GiB: now, and peak since it started.

    CUDA: active memory of the current device's allocator. CPU: resident memory.
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
    # VmHWM, not getrusage's maximum: that survives exec, so a small worker of a large launcher would report the
    # launcher's peak.
    kib = {key: int(value) for key, value in re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", status, re.MULTILINE)}
    current = kib.get("VmRSS", 0) * 1024 / GIB
    return current, max(current, kib.get("VmHWM", 0) * 1024 / GIB)


def _resident_gib_without_proc() -> tuple[float, float]:
    import resource
    import sys

    # Without /proc only the peak is known; it stands in for both. macOS counts bytes, other systems KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return peak, peak
