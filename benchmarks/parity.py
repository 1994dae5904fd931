"""Loss and gradient norm of every mesh against one rank, from the same weights and global batches, in fp32.

    python benchmarks/parity.py [--steps 20]

Every run is `run_train.sh` with the default recipe at 3 layers. Writes `benchmarks/results/parity.md`: the largest
relative difference of step 1 (must be below 1e-5) and of all steps (must be below 1e-4). Then a run is saved on 4 ranks
and resumed on 2, and the hashes of its global batches are set beside those of one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    *("--model.n_layers", "3", "--growth.enable", "false", "--training.mixed_precision_param", "float32"),
    *("--debug.seed", "1", "--debug.log_batch_hash", "--validation.enable", "false"),
]
MESHES = {
    "1 rank": (1, []),
    "fsdp 2": (2, []),
    "fsdp 4": (4, []),
    "hsdp 2 x 2": (4, ["--parallelism.data_parallel_replicate_degree", "2"]),
    "ddp 2": (2, ["--parallelism.data_parallel_replicate_degree", "2"]),
    "fsdp 8": (8, []),
}


def train(folder: Path, num_ranks: int, words: list[str]) -> list[dict[str, float]]:
    command = [str(ROOT / "run_train.sh"), *COMMON, "--job.dump_folder", str(folder), *words]
    environment = {**os.environ, "NGPU": str(num_ranks)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(lines: list[dict[str, float]], reference: list[dict[str, float]], key: str) -> float:
    return max(abs(line[key] - other[key]) / abs(other[key]) for line, other in zip(lines, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    steps = str(options.steps)
    rows = ["| mesh | loss, step 1 | grad norm, step 1 | loss, all steps | grad norm, all steps |", "|" + " --- |" * 5]
    worst_first = worst_all = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = {
            name: train(
                folder / name.replace(" ", "_"), ranks, ["--training.steps", steps, "--checkpoint.enable=false", *words]
            )
            for name, (ranks, words) in MESHES.items()
        }
        reference = runs["1 rank"]
        for name, lines in runs.items():
            first = [difference(lines[:1], reference[:1], key) for key in ("loss", "grad_norm")]
            every = [difference(lines, reference, key) for key in ("loss", "grad_norm")]
            worst_first, worst_all = max(worst_first, *first), max(worst_all, *every)
            rows.append(f"| {name} | " + " | ".join(f"{value:.1e}" for value in first + every) + " |")
            print(rows[-1], flush=True)
        keep = ["--checkpoint.interval", "5", "--lr_scheduler.total_steps", steps]
        train(folder / "moved", 4, [*keep, "--training.steps", "10"])
        moved = train(folder / "moved", 2, [*keep, "--training.steps", steps])
        hashes = [[line["batch_hash"] for line in lines] for lines in (moved, reference)]
        equal = hashes[0] == hashes[1]
        shown = [
            f"| {line['step']} | {4 if line['step'] <= 10 else 2} | `{line['batch_hash'][:16]}` "
            f"| `{other['batch_hash'][:16]}` |"
            for line, other in zip(moved, reference, strict=True)
            if line["step"] in (1, 10, 11, options.steps)
        ]
    text = [
        "# Parity of meshes with one rank, fp32\n",
        f"`python benchmarks/parity.py --steps {steps}`: largest relative differences, default recipe at 3 layers, "
        f"loss {reference[0]['loss']:.6f} at step 1 and {reference[-1]['loss']:.6f} at step {steps} on one rank.\n",
        *rows,
        "\n## Saved on 4 ranks, resumed on 2\n",
        f"All {len(hashes[0])} hashes of the global batches equal those of one rank: {equal}.\n",
        "| step | ranks | hash | hash on one rank |",
        "|" + " --- |" * 4,
        *shown,
    ]
    (ROOT / "benchmarks/results/parity.md").write_text("\n".join(text) + "\n")
    assert worst_first < 1e-5
    assert worst_all < 1e-4
    assert equal


if __name__ == "__main__":
    main()
