"""Memory and time of the chunked cross-entropy against the plain one, which materialises the logits.

    python -m benchmarks.chunked_loss

Forward and backward of the output projection and the loss, for the vocabulary of Llama 3. Every measurement is a fresh
process, because the peak of a process never falls: its peak resident memory while the loss runs, less what was resident
before (inputs and libraries). Both figures contain the gradients themselves, which no method can avoid. Writes
`benchmarks/results/chunked_loss.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_growth.models.chunked_loss import chunked_cross_entropy_sum
from titan_growth.tools.labels import IGNORE_INDEX

ROOT = Path(__file__).resolve().parents[1]

VOCAB, DIM = 128256, 1024
POSITIONS = (2048, 4096)
CHUNKS = (256, 512)
DTYPES = ("float32", "bfloat16")


def plain_cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


def step(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
    """Mean loss and its gradients; 0 chunk tokens mean the plain loss."""
    if chunk_tokens:
        loss = chunked_cross_entropy_sum(hidden_ND, weight_VD, labels_N, chunk_tokens=chunk_tokens)
    else:
        loss = plain_cross_entropy_sum(hidden_ND, weight_VD, labels_N)
    loss = loss / int((labels_N != IGNORE_INDEX).sum())
    loss.backward()
    return loss.detach()


def inputs(positions: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states as after a norm, a head as initialised, one label in ten ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(positions, DIM, generator=generator).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocab, DIM, generator=generator) * DIM**-0.5).to(dtype).requires_grad_()
    labels_N = torch.randint(0, vocab, (positions,), generator=generator)
    labels_N[::10] = IGNORE_INDEX
    return hidden_ND, weight_VD, labels_N


def memory_mib(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def measure(positions: int, dtype: str, chunk_tokens: int, reference: Path) -> dict[str, float]:
    """To be called once in a process. The plain loss writes its results to `reference`, the chunked one compares."""
    step(*inputs(16, 256, getattr(torch, dtype)), chunk_tokens)  # libraries allocate their buffers at the first call
    tensors = inputs(positions, VOCAB, getattr(torch, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # making the inputs had a peak of its own: start again from here
    before = memory_mib("VmRSS")
    start = time.perf_counter()
    loss = step(*tensors, chunk_tokens)
    result = {"seconds": time.perf_counter() - start, "mib": memory_mib("VmHWM") - before}
    values = [loss, *(tensor.grad for tensor in tensors[:2] if tensor.grad is not None)]
    if not chunk_tokens:
        torch.save(values, reference)
        return result
    expected = torch.load(reference, mmap=True)
    for name, value, other in zip(("loss", "hidden", "weight"), values, expected, strict=True):
        result[name] = float((value.float() - other.float()).norm() / other.float().norm())
    return result


def measured_apart(positions: int, dtype: str, chunk_tokens: int, reference: Path) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.chunked_loss",
        "--measure",
        str(positions),
        dtype,
        str(chunk_tokens),
        str(reference),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    load = os.getloadavg()[0]
    rows = [
        "| dtype | positions | chunk | plain, MiB | chunked, MiB | ratio | plain, s | chunked, s | ratio "
        "| loss | hidden gradient | weight gradient |",
        "|" + " --- |" * 12,
    ]
    print("\n".join(rows), flush=True)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "plain.pt"
        for dtype in DTYPES:
            for positions in POSITIONS:
                plain = measured_apart(positions, dtype, 0, reference)
                for chunk_tokens in CHUNKS:
                    chunked = measured_apart(positions, dtype, chunk_tokens, reference)
                    ratios.append(chunked["mib"] / plain["mib"])
                    rows.append(
                        f"| {dtype} | {positions:,} | {chunk_tokens} | {plain['mib']:,.0f} | {chunked['mib']:,.0f} "
                        f"| {ratios[-1]:.2f} | {plain['seconds']:.1f} | {chunked['seconds']:.1f} "
                        f"| {chunked['seconds'] / plain['seconds']:.2f} "
                        f"| {chunked['loss']:.1e} | {chunked['hidden']:.1e} | {chunked['weight']:.1e} |"
                    )
                    print(rows[-1], flush=True)
    weight_mib = VOCAB * DIM * 4 / 2**20
    text = [
        "# Chunked cross-entropy against materialised logits\n",
        f"`python -m benchmarks.chunked_loss`: forward and backward of head and loss, vocabulary {VOCAB:,}, width "
        f"{DIM:,}, on {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads. The cores are shared (load {load:.1f} at the start), and each figure is "
        "one run: seconds are noise; memory repeats to 15% or better.\n",
        *rows,
        "\nMiB: peak resident memory of a fresh process, less what was resident before (weight, hidden states, "
        f"libraries). It contains the gradient of the weight: {weight_mib:,.0f} MiB in float32, half of that in "
        "bfloat16. The chunked loss sums it in float32 in either case, and holds that sum beside the gradient while it "
        "scales it by the incoming gradient. Ratios are chunked / plain. The last three columns are differences from "
        "the plain loss in the same dtype, |chunked - plain| / |plain| (L2 norms); in bfloat16 both round.\n",
        f"Largest ratio of memory: {max(ratios):.2f}; smallest: {min(ratios):.2f}.",
    ]
    (ROOT / "benchmarks/results/chunked_loss.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    options = parser.parse_args()
    if options.measure is None:
        main()
    else:
        number, name, chunk, path = options.measure
        print(json.dumps(measure(int(number), name, int(chunk), Path(path))))
