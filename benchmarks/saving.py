"""What a save costs: against a plain write of as many bytes, and, in the background, the steps beside it.

    python -m benchmarks.saving [--gib 1.0] [--repeats 7] [--steps 120] [--ranks 1]

**Rate.** The same tensors are saved as a checkpoint (shards, metadata, checksums, manifest, all of it on the disk when
it returns) and written as plain files with fsync, on the same disk, by as many processes, in turns. The ratio of the
two rates must be at least `LEAST_RATE`.

**Steps.** One training run with `checkpoint.async_mode = "async"`, on ranks of one thread each that leave a core free.
Every step is timed from its batch to its end without what the loop does between steps, and said to be overlapped when
a save was under way at any time in it. What the overlapped steps took more than the median of the others of the same
run, in all, must be less than `MOST_SLOWDOWN` of what they take anyway. Staging, which the loop waits for, is reported
apart. Nothing else may run meanwhile. Writes `benchmarks/results/saving.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from tests.harness import run_ranks
from tests.runs import make_recipe, save_tensors, trainer_of
from titan_growth.checkpoint.manager import CheckpointManager
from titan_growth.config.schema.recipe import CheckpointConfig

ROOT = Path(__file__).resolve().parents[1]

RESULT = ROOT / "benchmarks" / "results" / "saving.md"
LEAST_RATE = 0.7
MOST_SLOWDOWN = 0.1
TENSOR_BYTES = 64 << 20


def plain_write(path: Path, tensors: list[torch.Tensor]) -> float:
    """Seconds of a plain write of the tensors' bytes, with fsync."""
    began = time.perf_counter()
    with open(path, "wb") as file:
        for tensor in tensors:
            file.write(tensor.numpy().data.cast("B"))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def rates(rank: int, folder: Path, num_bytes: int, repeats: int) -> list[tuple[float, float]]:
    """(seconds of the plain write, seconds of the save) of each repeat, the slowest rank's."""
    generator = torch.Generator().manual_seed(rank)
    count = max(1, num_bytes // TENSOR_BYTES)
    tensors = [torch.rand(TENSOR_BYTES // 4, generator=generator) for _ in range(count)]
    named = {f"rank_{rank}.{number}": tensor for number, tensor in enumerate(tensors)}
    checkpoints = CheckpointManager(CheckpointConfig(enable=True, keep_latest_k=2), folder)
    found = []
    for step in range(1, repeats + 2):
        dist.barrier()
        plain = plain_write(folder / f"plain-{rank}", tensors)
        (folder / f"plain-{rank}").unlink()
        dist.barrier()
        began = time.perf_counter()
        save_tensors(checkpoints, step, named)
        both = torch.tensor([plain, time.perf_counter() - began])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        checkpoints.saver.close()  # what is removed in the background must not disturb the next write
        if step > 1:
            found.append((both[0].item(), both[1].item()))
    return found


def steps_of(rank: int, num_ranks: int, recipe: Any) -> dict[str, Any]:
    """Seconds of the steps beside a save and of the others, of staging and of writing."""
    with trainer_of(recipe, num_ranks) as trainer:
        saver = trainer.checkpointer.saver
        under_way = lambda: saver._thread is not None and saver._thread.is_alive()  # noqa: E731
        began: list[tuple[float, bool]] = []
        beside: list[float] = []
        alone: list[float] = []
        staging: list[float] = []
        writing: list[float] = []
        agree, record, save, write = trainer.agree, trainer.record, trainer.save, saver._save

        def first(runtime: Any, batch: Any) -> Any:
            began.append((time.perf_counter(), under_way()))
            return agree(runtime, batch)

        def last(*args: Any) -> None:
            record(*args)
            start, overlapped = began[-1]
            seconds = time.perf_counter() - start
            if trainer.progress.step > 10:
                (beside if overlapped or under_way() else alone).append(seconds)

        def staged(**kwargs: Any) -> None:
            start = time.perf_counter()
            save(**kwargs)
            staging.append(time.perf_counter() - start)

        def written(content: Any) -> None:
            start = time.perf_counter()
            write(content)
            writing.append(time.perf_counter() - start)

        trainer.agree, trainer.record, trainer.save, saver._save = first, last, staged, written
        assert trainer.fit()
    return {"beside": beside, "alone": alone, "staging": staging[1:], "writing": writing[1:]}


def step_recipe(folder: Path, num_ranks: int, steps: int) -> Any:
    """A run whose save takes several of its steps: many parameters, few tokens."""
    return make_recipe(
        folder / "run",
        model__dim=768,
        model__n_layers=8,
        model__n_heads=12,
        model__n_kv_heads=12,
        training__seq_len=96,
        training__local_batch_size=1,
        training__global_batch_size=num_ranks,
        training__steps=steps,
        optimizer__implementation="foreach",
        checkpoint__enable=True,
        checkpoint__interval=10,
        checkpoint__keep_latest_k=2,
        checkpoint__async_mode="async",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="bytes of a save of all ranks together, in GiB")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--ranks", type=int, default=1, help="of the training run; one core must stay free")
    parser.add_argument("--folder", help="on the disk to be measured; default: the temporary folder")
    options = parser.parse_args()
    lines = [
        "# What a save costs",
        "",
        f"`python -m benchmarks.saving --gib {options.gib:g} --repeats {options.repeats} --steps {options.steps} "
        f"--ranks {options.ranks}`, {os.cpu_count()} cores, one thread a rank, nothing else running.",
        "",
        "## Rate, against a plain write with fsync",
        "",
        "| ranks | plain write, s | save, s | save / plain rate, median of repeats | lowest | highest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    numbers: dict[str, Any] = {}
    ratios_of: dict[int, float] = {}
    for num_ranks in (1, 2):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            num_bytes = int(options.gib * 2**30 / num_ranks)
            found = run_ranks(rates, num_ranks, Path(name), num_bytes, options.repeats, timeout_seconds=900)[0]
        ratios = [plain / save for plain, save in found]
        ratios_of[num_ranks] = median(ratios)
        numbers[f"rate_{num_ranks}"] = found
        plain, save = (median(pair[index] for pair in found) for index in (0, 1))
        row = (
            f"| {num_ranks} | {plain:.2f} | {save:.2f} | {median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )
        print(row, flush=True)
        lines.append(row)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        recipe = step_recipe(Path(name), options.ranks, options.steps)
        steps = run_ranks(steps_of, options.ranks, options.ranks, recipe, timeout_seconds=1800)[0]
    usual = median(steps["alone"])
    extra = sum(steps["beside"]) - usual * len(steps["beside"])
    slowdown = extra / (usual * len(steps["beside"]))
    lines += [
        "",
        "## Steps beside a save in the background",
        "",
        "| ranks | steps alone | median, s | steps beside a save | median, s | slower | staging, s | writing, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| {options.ranks} | {len(steps['alone'])} | {usual:.3f} "
        f"| {len(steps['beside'])} | {median(steps['beside']):.3f} "
        f"| {100 * slowdown:+.1f} % | {median(steps['staging']):.3f} | {median(steps['writing']):.2f} |",
        "",
        f"The rate must be at least {LEAST_RATE:g} of the plain one, and the steps less than "
        f"{100 * MOST_SLOWDOWN:.0f} % slower.",
    ]
    print("\n".join(lines[-6:]))
    RESULT.write_text("\n".join(lines) + "\n")
    RESULT.with_suffix(".json").write_text(json.dumps({**numbers, "steps": steps}) + "\n")
    assert len(steps["beside"]) >= 10, "hardly a step was beside a save: choose a larger model"
    assert slowdown < MOST_SLOWDOWN, f"{100 * slowdown:.1f} % slower"
    assert min(ratios_of.values()) >= LEAST_RATE, f"rates of {ratios_of}"


if __name__ == "__main__":
    main()
