"""The meter's arithmetic under a clock that the test moves, the peaks, and the memory in use."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from titan_growth.metrics.hardware import memory_gib, peak_flops_per_second
from titan_growth.metrics.throughput import Throughput

ROOT = Path(__file__).parents[3]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_metrics_rates_are_those_of_the_window_only(clock: Clock) -> None:
    meter = Throughput(peak_flops=1000.0, num_devices=2, clock=clock)
    clock.pass_seconds(4.0)
    meter.count_step(tokens=100, flops_per_token=6.0)
    meter.count_step(tokens=100, flops_per_token=6.0)
    window = meter.take()
    assert (window.num_steps, window.tokens, window.seconds, window.step_seconds) == (2, 200, 4.0, 2.0)
    assert window.tokens_per_second == 50.0
    assert window.mfu == pytest.approx(6.0 * 50.0 / (1000.0 * 2))

    clock.pass_seconds(1.0)
    meter.count_step(tokens=100, flops_per_token=12.0)
    assert meter.take().tokens_per_second == 100.0
    assert meter.mean_tokens_per_second() == 60.0
    assert meter.mean_mfu() == pytest.approx((200 * 6 + 100 * 12) / 5.0 / 2000.0)


def test_metrics_mfu_of_a_window_with_a_growth_in_it_weighs_both_models(clock: Clock) -> None:
    meter = Throughput(peak_flops=1000.0, clock=clock)
    clock.pass_seconds(2.0)
    meter.count_step(tokens=10, flops_per_token=10.0)
    meter.count_step(tokens=10, flops_per_token=30.0)
    assert meter.take().mfu == pytest.approx(400.0 / 2.0 / 1000.0)


def test_metrics_pauses_are_left_out_of_rates_and_kept_by_name(clock: Clock) -> None:
    meter = Throughput(peak_flops=1.0, clock=clock)
    clock.pass_seconds(1.0)
    with meter.pause("checkpoint"):
        clock.pass_seconds(30.0)
    with meter.pause("validation"):
        clock.pass_seconds(5.0)
    with meter.pause("checkpoint"):
        clock.pass_seconds(10.0)
    clock.pass_seconds(1.0)
    meter.count_step(tokens=10, flops_per_token=1.0)
    assert meter.take().tokens_per_second == 5.0
    assert meter.phase_seconds() == {"train": 2.0, "data": 0.0, "checkpoint": 40.0, "validation": 5.0}


def test_metrics_nested_pauses_count_every_second_once(clock: Clock) -> None:
    meter = Throughput(peak_flops=1.0, clock=clock)
    with meter.pause("growth"):
        clock.pass_seconds(1.0)
        with meter.pause("checkpoint"):
            clock.pass_seconds(2.0)
        clock.pass_seconds(4.0)
    assert meter.phase_seconds() == {"train": 0.0, "data": 0.0, "growth": 5.0, "checkpoint": 2.0}


def test_metrics_a_pause_ends_when_its_block_raises(clock: Clock) -> None:
    meter = Throughput(peak_flops=1.0, clock=clock)

    def failing_checkpoint() -> None:
        with meter.pause("checkpoint"):
            clock.pass_seconds(1.0)
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011 (raised right here)
        failing_checkpoint()
    clock.pass_seconds(2.0)
    assert meter.phase_seconds() == {"train": 2.0, "data": 0.0, "checkpoint": 1.0}


def test_metrics_waiting_for_data_is_training_time_except_within_a_pause(clock: Clock) -> None:
    meter = Throughput(peak_flops=1.0, clock=clock)
    with meter.data():
        clock.pass_seconds(1.0)
    clock.pass_seconds(3.0)
    with meter.pause("validation"), meter.data():
        clock.pass_seconds(7.0)
    for _ in range(2):
        meter.count_step(tokens=8, flops_per_token=1.0)
    window = meter.take()
    assert (window.seconds, window.data_seconds, window.data_seconds_per_step) == (4.0, 1.0, 0.5)
    assert window.tokens_per_second == 4.0
    assert meter.phase_seconds() == {"train": 3.0, "data": 1.0, "validation": 7.0}


def test_metrics_start_drops_the_time_of_setting_up(clock: Clock) -> None:
    meter = Throughput(peak_flops=1.0, clock=clock)
    clock.pass_seconds(100.0)
    meter.start()
    clock.pass_seconds(2.0)
    meter.count_step(tokens=10, flops_per_token=1.0)
    assert meter.take().tokens_per_second == 5.0


def take_steps(meter: Throughput, clock: Clock, num_steps: int, step_seconds: float) -> None:
    for _ in range(num_steps):
        clock.pass_seconds(step_seconds)
        meter.count_step(tokens=1, flops_per_token=1.0)
    meter.take()


def test_metrics_eta_forgets_the_slow_first_step(clock: Clock) -> None:
    meter = Throughput(peak_flops=1.0, clock=clock)
    assert math.isnan(meter.eta_seconds(10))
    take_steps(meter, clock, 1, 60.0)
    assert meter.eta_seconds(10) == 600.0
    take_steps(meter, clock, 5, 2.0)
    assert meter.eta_seconds(10) == pytest.approx(20.0)
    assert meter.eta_seconds(-3) == 0.0


def test_metrics_eta_is_smoothed_by_steps_not_by_windows(clock: Clock) -> None:
    one, many = Throughput(peak_flops=1.0, clock=clock), Throughput(peak_flops=1.0, clock=clock)
    for meter, size in ((one, 10), (many, 1)):
        meter.start()
        take_steps(meter, clock, 2, 1.0)
        for _ in range(10 // size):
            take_steps(meter, clock, size, 2.0)
    assert one.eta_seconds(1) == pytest.approx(many.eta_seconds(1))
    assert 1.0 < one.eta_seconds(1) < 2.0


def test_metrics_eta_after_a_growth_is_that_of_the_grown_model(clock: Clock) -> None:
    meter = Throughput(peak_flops=1.0, clock=clock)
    take_steps(meter, clock, 20, 1.0)
    meter.forget_step_time()
    take_steps(meter, clock, 5, 4.0)
    assert meter.eta_seconds(1) == pytest.approx(4.0)


def test_metrics_empty_window_has_no_rates(clock: Clock) -> None:
    window = Throughput(peak_flops=1.0, clock=clock).take()
    assert (window.tokens_per_second, window.mfu, window.step_seconds, window.data_seconds_per_step) == (0, 0, 0, 0)


def test_metrics_meter_refuses_nonsense(clock: Clock) -> None:
    with pytest.raises(ValueError, match="positive"):
        Throughput(peak_flops=0.0)
    with pytest.raises(ValueError, match="positive"):
        Throughput(peak_flops=1.0, num_devices=0)
    with pytest.raises(ValueError, match="not a pause"), Throughput(peak_flops=1.0).pause("train"):
        pass


# ---- peaks


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI300X", 1300e12),
    ],
)
def test_metrics_known_gpus_have_their_dense_peak(name: str, peak: float) -> None:
    value, text = peak_flops_per_second("cuda", name, torch.bfloat16)
    assert value == peak
    assert text.startswith("dense fp16 peak" if "V100" in name else "dense bf16 peak")
    assert name in text


@pytest.mark.parametrize(
    "name", ["NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100X", "NVIDIA L40"]
)
def test_metrics_gpus_that_only_look_known_are_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_growth.metrics import hardware

    monkeypatch.setattr(hardware, "_measured_matmul_rate", lambda device_type, dtype: 4.2e12)
    assert peak_flops_per_second("cuda", name, torch.bfloat16) == (
        4.2e12,
        "measured bf16 matmul peak of this process 4.2 TFLOP/s",
    )


@pytest.mark.parametrize(("dtype", "short"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_metrics_cpu_peak_is_measured_quickly_and_plausibly(dtype: torch.dtype, short: str) -> None:
    random_state = torch.get_rng_state()
    begin = time.perf_counter()
    # A name out of the table must not lend a CPU that GPU's peak.
    peak, text = peak_flops_per_second("cpu", "H100", dtype)
    seconds = time.perf_counter() - begin
    assert text.startswith(f"measured {short} matmul peak of this process ")
    assert seconds < 3.0  # budgeted for 0.4 s; the rest is for a machine busy with other tests
    assert 1e7 < peak < 100e12
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("rate", [0.14e9, 2e9, 20e9, 200e9])
def test_metrics_measurement_finds_the_rate_behind_overheads_and_hiccups_in_time(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    # A device of exactly this rate whose every call costs 0.2 ms more, and every third one another 20 ms.
    num_calls = 0

    def multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        nonlocal num_calls
        num_calls += 1
        clock.pass_seconds(2.0 * len(left) ** 3 / rate + 0.0002 + (0.02 if num_calls % 3 == 0 else 0.0))

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(time, "perf_counter", clock)
    begin = clock.now
    peak, _ = peak_flops_per_second("cpu", "", torch.float32)
    assert 0.93 * rate < peak <= rate
    assert clock.now - begin < 0.4


# ---- memory


def test_metrics_cpu_memory_follows_what_the_process_holds() -> None:
    # In a process of its own: the peak of this one depends on the tests before.
    code = (
        "import torch\n"
        "from titan_growth.metrics.hardware import memory_gib\n"
        "before = memory_gib('cpu')\n"
        "held = torch.ones(256 * 2**20, dtype=torch.uint8)\n"
        "during = memory_gib('cpu')\n"
        "del held\n"
        "print(*before, *during, *memory_gib('cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    before, before_peak, during, during_peak, after, after_peak = map(float, done.stdout.split())
    assert during - before == pytest.approx(0.25, abs=0.05)
    assert during - after == pytest.approx(0.25, abs=0.05)
    assert before_peak >= before
    assert after_peak == pytest.approx(during_peak, abs=0.02)
    assert after_peak > after + 0.15


def test_metrics_memory_without_proc_falls_back_to_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    _, peak = memory_gib("cpu")

    def no_proc(self: Path) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", no_proc)
    current, fallback_peak = memory_gib("cpu")
    assert current == fallback_peak
    assert fallback_peak >= 0.9 * peak
    assert fallback_peak < 100.0  # the unit is right: bytes taken for KiB would be a thousand times this


@pytest.mark.gpu
def test_metrics_cuda_memory_follows_the_allocator() -> None:
    before, _ = memory_gib("cuda")
    held = torch.ones(256 * 2**20, dtype=torch.uint8, device="cuda")
    during, _ = memory_gib("cuda")
    del held
    after, peak = memory_gib("cuda")
    assert during - before == pytest.approx(0.25, abs=0.01)
    assert after == pytest.approx(before, abs=0.01)
    assert peak >= during
