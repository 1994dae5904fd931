"""Does growing pay, at annealed ends, tuned on both sides? Trains what `growth_study_runs.py` lists; keeps the results.

    python -m benchmarks.growth_study [--study tuning ...] [--jobs 2] [--again | --list | --page | --files]
    python -m benchmarks.growth_study --device cuda --study tuning headline --jobs 4    # half an hour of one H100

Every run goes through `run_train.sh`, its cool-downs through `titan_growth branch`, with one thread for each job.
A finished end is appended to `benchmarks/results/growth_study.json` at once and is never trained again; a run that was
stopped goes on from its checkpoint if its folder is still there. FLOPs and losses do not mind what else the machine
does; the seconds do, and are not for quoting. `--again --jobs 1` on a machine that does nothing else trains the chosen
runs anew, for seconds that can be quoted, and to see whether the losses are the same. `--page` makes page and pictures
anew from the file alone, `--files` prints the files of the corpus with their hashes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.arms import ROOT
from benchmarks.growth_study_corpus import LISTING, prepared_tokens, print_files, write_listing
from benchmarks.growth_study_page import write_page
from benchmarks.growth_study_results import append_result, read_results
from benchmarks.growth_study_runs import SCALES, Scale, Trunk, cool_down_steps
from benchmarks.growth_study_tables import trunks
from titan_growth.metrics.lines import read_lines
from titan_growth.tools.run_folder import METRICS_FILE
from titan_growth.version import __version__

_HELD_OUT = ("--validation.steps", "128")
"""Batches that judge an end: 0.5M tokens, of which the standard error is worth 1 % of FLOPs."""


def main(argv: list[str] | None = None) -> int:
    """Trains what is left of the chosen studies; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(SCALES), default="cpu", help="width 64 on a CPU, 512 on GPUs")
    parser.add_argument("--study", nargs="+", help="only these tables (default: all, in their order)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--list", action="store_true", help="show what is left and what it takes, and train nothing")
    parser.add_argument("--again", action="store_true", help="train the chosen runs anew beside what there is")
    parser.add_argument("--page", action="store_true", help="make page and pictures anew, and train nothing")
    parser.add_argument("--files", action="store_true", help="print every file of the corpus with its SHA-256")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "growth_study")
    options = parser.parse_args(argv)
    scale = SCALES[options.device]
    if options.page:
        write_page(read_results(scale.result), scale)
    elif options.list:
        _list(_chosen(options, scale), scale)
    elif options.files:
        print_files()
    else:
        return _train_all(options, scale)
    return 0


def _train_all(options: argparse.Namespace, scale: Scale) -> int:
    num_gpus = torch.cuda.device_count()
    if options.device == "cuda" and not num_gpus:
        sys.exit("--device cuda: this machine has no GPU that torch can use. Leave it out to train the study of a CPU")
    devices = itertools.cycle(map(str, range(num_gpus))) if options.device == "cuda" else itertools.repeat("")
    tokens = _tokens_of_all(scale)
    failures: list[str] = []
    tried: set[Trunk] = set()
    while new := [trunk for trunk in _chosen(options, scale) if trunk not in tried]:
        tried.update(new)
        with ThreadPoolExecutor(options.jobs) as pool:
            told = pool.map(lambda trunk, device: _train_or_say(trunk, options, tokens, device), new, devices)
            failures += [failure for failure in told if failure]
    write_page(read_results(scale.result), scale)
    print("\n".join(failures))
    return 1 if failures else 0


def _chosen(options: argparse.Namespace, scale: Scale) -> list[Trunk]:
    """What the words ask for and can be trained by now: what follows the tuning is known after it."""
    return [
        trunk
        for trunk in trunks(read_results(scale.result)["ends"], scale)
        if (not options.study or trunk.study in options.study) and (not options.seeds or trunk.seed in options.seeds)
    ]


def _tokens_of_all(scale: Scale) -> str:
    """The tokens to train on, which must be those of the ends that there are."""
    tokens = prepared_tokens(scale.recipe)
    others = {entry["tokens_trained_on"] for entry in read_results(scale.result)["ends"]} - {tokens}
    if others:
        sys.exit(
            f"{scale.result}: its ends were trained on other text (tokens {', '.join(others)}) than is installed here "
            f"({tokens}). Make an environment with ./setup.sh test, which installs what {LISTING.name} lists"
        )
    write_listing(tokens)
    return tokens


def _list(chosen: list[Trunk], scale: Scale) -> None:
    found = read_results(scale.result)["ends"]
    done = {entry["key"] for entry in found}
    rates = [entry["flops"] / entry["seconds"] for entry in found if entry["seconds"] > 0]
    rate = sum(rates) / len(rates) if rates else scale.usual_flops_per_second
    total = 0.0
    for trunk in chosen:
        left = [end for end in trunk.ends if trunk.key(end) not in done]
        minutes = trunk.flops_left(done) / rate / 60
        total += minutes
        state = f"{', '.join(f'{end:,}' for end in left)} left, {minutes:.0f} min" if left else "done"
        print(f"{trunk.study:10} {trunk.arm}, seed {trunk.seed}: {state}")
    print(f"in all {total / 60:.1f} hours of one job at {rate / 1e9:,.0f} GFLOP/s, and the starts of the runs")


def _train_or_say(trunk: Trunk, options: argparse.Namespace, tokens: str, device: str) -> str | None:
    """Trains a trunk and its ends; what went wrong, if anything did: the other trunks do not depend on it."""
    kind = "repeats" if options.again else "ends"
    done = {entry["key"] for entry in read_results(trunk.scale.result)[kind]}
    left = [end for end in trunk.ends if trunk.key(end) not in done]
    if not left:
        return None
    folder = options.folder / "again" if options.again else options.folder
    environment = {**os.environ, "NGPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": device}
    try:
        for ended in _train(replace(trunk, ends=tuple(left)), trunk.interval, folder, environment):
            append_result(trunk.scale.result, kind, _entry(trunk, ended, tokens))
    except (subprocess.CalledProcessError, OSError) as error:
        return f"{trunk.study}, {trunk.arm}, seed {trunk.seed}: {error}"
    return None


class Ended(NamedTuple):
    """A run that has come to its end, and its folders."""

    end: int
    stem: Path
    branch: Path
    """Of the cool-down; that of the trunk for a run that is whole."""


def _train(trunk: Trunk, interval: int, folder: Path, environment: dict[str, str]) -> Iterator[Ended]:
    """Trains a trunk and its ends, some of which may have been trained before.

    Args:
        interval: between the checkpoints of all ends, so that the trunk is the same one whatever is left.
    """
    stem = folder / f"trunk-{trunk.key(0)}-{interval}"
    common = [
        "--job.config_file",
        str(trunk.scale.recipe),
        "--job.dump_folder",
        str(stem),
        "--debug.seed",
        str(trunk.seed),
    ]
    if trunk.is_whole:
        (end,) = trunk.ends
        steps = ["--training.steps", str(end), "--validation.freq", str(end)]
        _run([*common, *steps, *_HELD_OUT, *trunk.words], environment)
        yield Ended(end, stem, stem)
        return
    _run(
        [
            *common,
            "--training.steps", str(trunk.stems[-1]),
            "--lr_scheduler.decay_ratio", "0",
            "--checkpoint.interval", str(interval),
            "--checkpoint.keep_latest_k", "0",
            *trunk.words,
        ],
        environment,
    )  # fmt: skip
    for end, step in zip(trunk.ends, trunk.stems, strict=True):
        branch = stem.parent / f"{stem.name}-end-{end}"
        if not (branch / "branch.toml").exists():
            source = stem / "checkpoint" / f"step-{step}"
            words = ["--from", str(source), "--steps", str(cool_down_steps(end)), "--to", str(branch)]
            subprocess.run(
                [sys.executable, "-m", "titan_growth", "branch", *words], cwd=ROOT, env=environment, check=True
            )
        _run(["--job.config_file", str(branch / "branch.toml"), *_HELD_OUT], environment)
        yield Ended(end, stem, branch)


def _run(words: list[str], environment: dict[str, str]) -> None:
    subprocess.run([str(ROOT / "run_train.sh"), *words], env=environment, cwd=ROOT, check=True)


def _entry(trunk: Trunk, ended: Ended, tokens: str) -> dict[str, Any]:
    """What the file holds of an end."""
    end, stem, branch = ended
    last, stem_step = _validations(branch)[-1], end - cool_down_steps(end)
    trunk_losses = [[one["step"], round(one["validation_loss"], 5)] for one in _validations(stem)]
    return {
        "key": trunk.key(end),
        "study": trunk.study,
        "arm": trunk.arm,
        "seed": trunk.seed,
        "end": end,
        "words": list(trunk.words),
        "loss": last["validation_loss"],
        **{cost: last[cost] for cost in ("tokens", "flops", "seconds")},
        "trunk": [one for one in trunk_losses if one[0] <= stem_step],
        "growths": around_growths(stem),
        "tokens_trained_on": tokens,
        "machine": machine(),
        "torch": torch.__version__,
        "version": __version__,
        "commit": _commit(),
    }


def around_growths(folder: Path) -> list[dict[str, Any]]:
    """Of each growth its step, and the training losses around it: how high they jump, and how soon they are back."""
    lines = read_lines(folder / METRICS_FILE, lambda line: line)
    found = []
    for growth in (line for line in lines if line.get("event") == "growth"):
        near = range(growth["step"] - 100, growth["step"] + 401)
        losses = [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line and line["step"] in near]
        found.append({"step": growth["step"], "to_layers": growth["to_layers"], "losses": losses})
    return found


def _validations(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that have a validation loss."""
    lines = read_lines(folder / METRICS_FILE, lambda line: line)
    return [line for line in lines if line.get("validation_loss") is not None]


def machine() -> str:
    """The processor, and whether it has matrix units: what decides the last digits of a loss."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = next(line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name"))
    return f"{name}{', AMX' if 'amx_tile' in cpu else ''}"


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
