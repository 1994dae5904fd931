"""What a growth reads, how long that takes, and how much memory: on 1, 2, 4 and 8 ranks, beside a plain load.

    python -m benchmarks.growth_read [--layers 4] [--factor 4] [--dim 512] [--repeats 5]

Once with `stack`, which copies whole rows, and once with `split_width`, which gathers channels.

A small model with its moments is saved on two ranks. On each number of ranks it is grown from there (weights and both
moments), and the grown model's own checkpoint, saved on two ranks as well, is loaded as a resume would: DCP's load and
the growth read fill the very same shards, in turns. Reported per rank: stored bytes read, the largest stored chunk, the
memory that came on top of the shards while reading and while verifying, and the median of the ratios of the seconds
taken. The growth must take at most 1.3 times as long, and at most the largest chunk more memory (`SLACK_MIB` apart).
Verification is apart, as a resume's checksums are. Writes `benchmarks/results/growth_read.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from tests.harness import run_ranks
from tests.runs import make_recipe, save_tensors
from titan_growth.checkpoint.loading import load
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.checkpoint.reader import SafeReader, StoredChunk
from titan_growth.engine.build import build
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.state import model_tensors, optimizer_tensors
from titan_growth.growth.read import read_grown
from titan_growth.growth.rules import Rules
from titan_growth.growth.verify import verify_growth
from titan_growth.layout.mesh import Mesh
from titan_growth.models.registry import family_module
from titan_growth.run.plan import plan_run
from titan_growth.tools.findings import Findings

ROOT = Path(__file__).resolve().parents[1]

RESULT = ROOT / "benchmarks" / "results" / "growth_read.md"
SAVED_ON = 2
LIMIT = 1.3
SLACK_MIB = 4.0
"""What a process takes for itself: names, rules, lists of chunks, rows under way."""
MIB = 2**20


def tensors_of(recipe: Any, num_ranks: int, phase_number: int, seed: int | None) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state of a phase's model on this rank."""
    plan = plan_run(recipe, found := Findings(), num_ranks=num_ranks, device_type="cpu")
    assert plan is not None, found.problems
    phase = plan.phases[phase_number]
    mesh = Mesh.get(phase.mesh_shape, "cpu")
    model = build(
        phase.config,
        family=recipe.model.name,
        mesh=mesh,
        stages=phase.stages,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seq_len=recipe.training.seq_len,
        seed=seed,
    )
    optimizer = Optimizer.of(model, recipe.optimizer, max_norm=1.0)
    tensors_of.kept = (model, optimizer)  # type: ignore[attr-defined]
    return {**model_tensors(model.parts), **optimizer_tensors(optimizer)}


def saved(rank: int, num_ranks: int, recipe: Any, phase_number: int, step: int) -> None:
    """Saves a model of a phase, with moments that are nothing special."""
    tensors = tensors_of(recipe, num_ranks, phase_number, seed=1)
    for name, tensor in tensors.items():
        if name.endswith((".exp_avg", ".exp_avg_sq")):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local.fill_(0.5)
    manager = CheckpointManager(recipe.checkpoint, Path(recipe.job.dump_folder))
    save_tensors(manager, step, tensors, num_ranks=num_ranks, model_only=False, permanent=True)


class CountingReader(SafeReader):
    """Remembers the largest chunk it has read."""

    largest_chunk = 0

    def read_chunk(self, chunk: StoredChunk, buffer: torch.Tensor | None = None) -> torch.Tensor:
        self.largest_chunk = max(self.largest_chunk, chunk.length)
        return super().read_chunk(chunk, buffer)


class Peak:
    """The most memory that a process has while it is entered, beyond what it had when first entered, in MiB.

    Over all times that it is entered: what an allocator keeps from one to the next counts.
    """

    mib = 0.0

    def __enter__(self) -> Peak:
        if not hasattr(self, "before"):
            self.before = _resident()
        self.most = 0
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, _resident())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()
        self.mib = max(self.mib, (max(self.most, _resident()) - self.before) / MIB)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(rank: int, num_ranks: int, recipe: Any, repeats: int) -> dict[str, Any]:
    """This rank's figures; seconds are of the slowest rank."""
    plan = plan_run(recipe, Findings(), num_ranks=num_ranks, device_type="cpu")
    assert plan is not None
    growth, stage = plan.growth_plan.chain.maps[0], plan.growth_plan.planned[0]
    rules = Rules(growth, stage, family_module(recipe.model.name))
    manager = CheckpointManager(recipe.checkpoint, Path(recipe.job.dump_folder))
    tensors = tensors_of(recipe, num_ranks, 1, seed=2)  # written to once, so that its pages are there
    shards = sum(_local(tensor).numel() * _local(tensor).element_size() for tensor in tensors.values())
    times: dict[str, list[float]] = {"growth": [], "load": []}
    peak, verifying = Peak(), Peak()
    reader = CountingReader(manager.root / "step-1")
    for watched in (peak, verifying):  # before any load, whose memory an allocator may hand on
        dist.barrier()
        with watched:
            if watched is peak:
                read_grown(SafeReader(manager.root / "step-1"), tensors, rules, seed=1)
            else:
                wrong = verify_growth(SafeReader(manager.root / "step-1"), tensors, rules)
                assert not wrong, wrong
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        reader = CountingReader(manager.root / "step-1")
        read_grown(reader, tensors, rules, seed=1)
        dist.barrier()
        times["growth"].append(time.perf_counter() - began)
        began = time.perf_counter()
        load(SafeReader(manager.root / "step-2"), tensors)
        dist.barrier()
        times["load"].append(time.perf_counter() - began)
    return {
        "bytes": reader.num_bytes_read,
        "chunks": reader.num_chunks_read,
        "largest": reader.largest_chunk,
        "shards": shards,
        "peak_mib": peak.mib,
        "verify_mib": verifying.mib,
        **times,
    }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the page, and returns 1 when a growth takes too long or too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    rows, failed, sizes = [], False, {}
    wide, deep = options.dim, options.layers
    for operator in ("stack", "split_width"):
        with tempfile.TemporaryDirectory(prefix="growth-read") as folder:
            recipe = make_recipe(
                Path(folder) / "run",
                model__n_layers=deep * options.factor if operator == "stack" else deep,
                model__dim=wide if operator == "stack" else 2 * wide,
                model__n_heads=8 if operator == "stack" else 16,
                model__n_kv_heads=8 if operator == "stack" else 16,
                model__vocab_size=8192,
                training__local_batch_size=1,
                checkpoint__enable=True,
                growth__stages__0__at="3 steps",
                growth__stages__0__operator=operator,
                growth__stages__0__factor=options.factor if operator == "stack" else 2,
                growth__stages__0__optimizer_state="copy",
            )
            for phase, step in ((0, 1), (1, 2)):
                run_ranks(saved, SAVED_ON, SAVED_ON, recipe, phase, step, timeout_seconds=600)
            steps = [Path(recipe.job.dump_folder) / "checkpoint" / f"step-{step}" for step in (1, 2)]
            sizes[operator] = " -> ".join(f"{_stored_bytes(step) / MIB:,.0f}" for step in steps)
            for num_ranks in (1, 2, 4, 8):
                ranks = run_ranks(measured, num_ranks, num_ranks, recipe, options.repeats, timeout_seconds=600)
                ratio = median(grown / load for grown, load in zip(ranks[0]["growth"], ranks[0]["load"], strict=True))
                keys = ("bytes", "chunks", "largest", "shards", "peak_mib", "verify_mib")
                most = {key: max(rank[key] for rank in ranks) for key in keys}
                failed |= ratio > LIMIT or most["peak_mib"] > most["largest"] / MIB + SLACK_MIB
                rows.append(
                    f"| {operator} | {num_ranks} | {most['bytes'] / MIB:,.1f} | {most['chunks']} | "
                    f"{most['largest'] / MIB:,.1f} | {most['shards'] / MIB:,.1f} | {most['peak_mib']:,.1f} | "
                    f"{most['verify_mib']:,.1f} | {median(ranks[0]['growth']):.2f} | "
                    f"{median(ranks[0]['load']):.2f} | {ratio:.2f} |"
                )
                print(rows[-1], flush=True)
    words = " ".join(["python -m benchmarks.growth_read", *(argv if argv is not None else sys.argv[1:])])
    RESULT.write_text(
        "\n".join(
            [
                "# What a growth reads",
                "",
                f"`{words}`: {deep} layers of width {wide} with their moments, saved on {SAVED_ON} ranks, grown to "
                f"{deep * options.factor} layers ({sizes['stack']} MiB) or to width {2 * wide} "
                f"({sizes['split_width']} MiB). FSDP on each number of ranks, one thread each, {os.cpu_count()} cores: "
                "with more ranks than cores only the ratio means anything. MiB and chunks are of the rank that has "
                "most. Memory is what came on top of the grown shards: while growing it must stay within the largest "
                f"stored chunk (and {SLACK_MIB:.0f} MiB of the process's own), while verifying it is one stored "
                "tensor, a chunk of it and the rows under way. A plain load is that of the grown model's own "
                "checkpoint into the same shards, in turns with the growth.",
                "",
                "| operator | ranks | MiB read | chunks | largest chunk | grown shards | memory on top, growing "
                "| verifying | growth, s | load, s | ratio |",
                "|" + " --- |" * 11,
                *rows,
                "",
                f"Largest ratio allowed: {LIMIT}. Each chunk is read once, however many layers are made of it.",
                "",
            ]
        )
    )
    return int(failed)


def _stored_bytes(path: Path) -> int:
    manifest = json.loads((path / "manifest.json").read_text())
    return sum(entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".distcp"))


if __name__ == "__main__":
    sys.exit(main())
