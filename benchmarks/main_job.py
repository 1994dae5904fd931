"""The main job as the README starts it: how long it takes, and what growing gives against training from scratch.

    python -m benchmarks.main_job

Runs the default recipe with an empty cache (tokenizer and preparation included), once more into another folder, and
once with growth switched off. Writes `benchmarks/results/main_job.md`, and the loss curves of all three as CSV.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, cache: Path, *words: str) -> tuple[float, list[dict[str, float]]]:
    """(seconds, metrics) of one run."""
    environment = {**os.environ, "TITAN_GROWTH_CACHE": str(cache)}
    start = time.monotonic()
    command = [str(ROOT / "run_train.sh"), "--job.dump_folder", str(folder), "--debug.seed", "1", *words]
    subprocess.run(command, env=environment, check=True)
    seconds = time.monotonic() - start
    return seconds, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first_seconds, grown = run(folder / "first", folder / "cache")
        second_seconds, again = run(folder / "second", folder / "cache")
        scratch_seconds, scratch = run(folder / "scratch", folder / "cache", "--growth.enable", "false")
    growth = next(line for line in grown if line.get("event") == "growth")
    validations = [line for line in grown if "validation_loss" in line]
    at_growth = next(line for line in validations if line["step"] == growth["step"])
    reached = validations[-1]["validation_loss"]
    baseline = [line for line in scratch if "validation_loss" in line]
    curves = [
        f"{name},{line['step']},{line['tokens']},{line['flops']},{line['validation_loss']}"
        for name, lines in (("grown", grown), ("again", again), ("from scratch", scratch))
        for line in lines
        if "validation_loss" in line
    ]
    header = "run,step,tokens,flops,validation_loss"
    (ROOT / "benchmarks/results/main_job.csv").write_text("\n".join([header, *curves]) + "\n")
    last = [line for line in grown if "tokens_per_second" in line]
    small = [line["tokens_per_second"] for line in last if line["num_layers"] == growth["from_layers"]]
    large = [line["tokens_per_second"] for line in last if line["num_layers"] == growth["to_layers"]]
    drop = at_growth["validation_loss"] - reached
    text = f"""# The main job

`python -m benchmarks.main_job` on {os.cpu_count()} cores, nothing else running; installation not included.

| run | seconds | FLOPs | last validation loss |
| --- | --- | --- | --- |
| first, empty cache | {first_seconds:.0f} | {last[-1]["flops"]:.3g} | {reached:.4f} |
| second, into another folder | {second_seconds:.0f} | {last[-1]["flops"]:.3g} | {again[-1]["validation_loss"]:.4f} |
| from scratch (`--growth.enable false`) | {scratch_seconds:.0f} | {scratch[-1]["flops"]:.3g} \
| {baseline[-1]["validation_loss"]:.4f} |

Grown {growth["from_layers"]} -> {growth["to_layers"]} layers at step {growth["step"]}: validation loss \
{at_growth["validation_loss"]:.4f} there, {reached:.4f} at the end, {drop:.4f} nats lower (it must be 0.05). On the \
held-out batch {growth["loss_before"]:.4f} just before and {growth["loss_after"]:.4f} just after. Median speed \
{sorted(small)[len(small) // 2]:,.0f} tokens/s before and {sorted(large)[len(large) // 2]:,.0f} after.

The from-scratch run spends {scratch[-1]["flops"] / last[-1]["flops"]:.2f} times the FLOPs on the same tokens. A run
this short says nothing about growth at scale; it shows that both sides of the comparison come from one recipe.
"""
    (ROOT / "benchmarks/results/main_job.md").write_text(text)
    print(text)
    assert drop >= 0.05


if __name__ == "__main__":
    main()
