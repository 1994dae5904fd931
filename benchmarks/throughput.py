"""How fast training is on this machine: recipes, meshes and techniques, one added at a time, against a baseline.

    python -m benchmarks.throughput                              without GPUs: 1, 2 and 8 ranks, forked here
    torchrun --nproc-per-node 8 -m benchmarks.throughput --recipes train_configs/llama3_8b.toml      on GPUs
    python -m benchmarks.throughput --list                       the cases, with their recipes, and nothing else
    ... --recipes small --case "mine=--parallelism.tensor_parallel_degree 2 --compile.enable true"   one of your own

Under torchrun, and on a machine with a GPU, all cases that fit the number of ranks run in the one process group, one
after another. Without GPUs each case has ranks of its own, and cores divided by ranks are its threads. The cases are in
`throughput_cases.py`, what a rank does and times in `throughput_running.py`, the figures in `throughput_report.py`.

The whole default sweep writes `benchmarks/results/throughput.json` (everything) and `.md` (tables); a part of it or a
sweep of your own writes where --out says, or nothing. It needs the machine for itself, and without GPUs about 10 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # As in run_train.sh, and before torch is loaded: threads that wait must not keep a core from those that work.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks import throughput_report as report  # noqa: E402
from benchmarks.throughput_cases import (  # noqa: E402
    SIZES,
    Case,
    PlannedCase,
    custom_cases,
    default_cases,
    groups_of,
    plan_case,
    selected,
    size_of,
    with_steps,
)
from benchmarks.throughput_ranks import CaseFailedError, ForkedCase, InProcessCase  # noqa: E402
from benchmarks.throughput_report import Outcome  # noqa: E402
from titan_growth.tools.collectives import init_process_group  # noqa: E402
from titan_growth.tools.device import Device  # noqa: E402

DEFAULT_OUT = ROOT / "benchmarks" / "results" / "throughput"
FORKED_RANKS = (1, 2, 8)


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; returns 1 when a case failed."""
    options = parse(argv)
    in_process = "TORCHELASTIC_RUN_ID" in os.environ or torch.cuda.is_available()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_ranks = int(os.environ.get("WORLD_SIZE", "1")) if in_process else None
    speaks = os.environ.get("RANK", "0") == "0"
    cases = wanted_cases(options, num_ranks, device_type, cores)
    groups = [[plan_case(case, device_type) for case in group] for group in groups_of(cases)]
    if options.list:
        if speaks:
            print_cases(groups)
        return 0
    if not groups:
        print("no case fits: --list shows those that there are for this number of ranks", file=sys.stderr)
        return 2
    device = Device("cpu", 0, "CPU")
    if in_process:
        device = Device.detect()
        init_process_group(device.type, options.timeout)
    settings = {name: getattr(options, name) for name in ("steps", "warmup", "repeats", "threads")}
    settings["forked"] = not in_process
    machine = report.environment(device.name, cores)
    out = out_path(options)
    done: list[list[Outcome]] = []
    with empty_compile_cache():
        for group in groups:
            sweep = Sweep(group, options, cores, device if in_process else None, quiet=not speaks)
            done.append(sweep.run())
            document = report.to_json(done, settings, machine)
            if speaks and out is not None:  # after every group: what has been measured is not lost
                out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
                out.with_suffix(".md").write_text(report.page(document))
    if speaks:
        print(report.page(document))
    if in_process:
        dist.destroy_process_group()
    return int(any(outcome.status == "failed" for group in done for outcome in group))


@contextlib.contextmanager
def empty_compile_cache() -> Iterator[None]:
    """What earlier runs have compiled is not found, so that first steps really compile."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


class Sweep:
    """One group of cases, measured in turns.

    Args:
        device: of the process group that all cases run in; None gives each case ranks of its own.
    """

    def __init__(
        self, group: list[PlannedCase], options: argparse.Namespace, cores: int, device: Device | None, *, quiet: bool
    ) -> None:
        self.options = options
        self.quiet = quiet
        self.running: dict[int, ForkedCase | InProcessCase] = {}
        self.outcomes = []
        self.device = device
        for planned in group:
            threads = options.threads or max(1, cores // planned.case.ranks)
            self.outcomes.append(Outcome(planned, torch.get_num_threads() if device is not None else threads))

    def run(self) -> list[Outcome]:
        """Starts all cases, then measures each of them in each repeat."""
        try:
            for position, outcome in enumerate(self.outcomes):
                self._start(position, outcome)
            for repeat in range(self.options.repeats):
                for position, outcome in enumerate(self.outcomes):
                    self._measure(position, outcome, repeat)
        finally:
            for running in self.running.values():
                running.stop()
        return self.outcomes

    def _start(self, position: int, outcome: Outcome) -> None:
        plan = outcome.planned.plan
        if plan is None:
            self._say(outcome, "refused: " + " ".join(outcome.planned.reasons))
            return
        running: ForkedCase | InProcessCase
        if self.device is not None:
            running = InProcessCase(plan, self.device)
        else:
            running = ForkedCase(plan, outcome.threads, self.options.timeout)
        self.running[position] = running
        try:
            running.start()
        except CaseFailedError as error:
            self._fail(position, outcome, error)

    def _measure(self, position: int, outcome: Outcome, repeat: int) -> None:
        if position not in self.running:
            return
        try:
            sample = self.running[position].measure(self.options.warmup, outcome.planned.case.size.steps)
        except CaseFailedError as error:
            self._fail(position, outcome, error)
            return
        outcome.samples.append(sample)
        speed, loss = outcome.tokens_per_second[-1], outcome.loss
        first_step = max(rank["first_step_seconds"] for rank in sample)
        first = f" (first step {first_step:.1f} s)" if repeat == 0 else ""
        self._say(outcome, f"repeat {repeat + 1}: {speed:,.0f} tokens/s, loss {loss:.4f}{first}")

    def _fail(self, position: int, outcome: Outcome, error: CaseFailedError) -> None:
        outcome.reason = str(error)
        outcome.samples.clear()
        self.running.pop(position).stop()
        self._say(outcome, f"failed: {error}")

    def _say(self, outcome: Outcome, text: str) -> None:
        if not self.quiet:
            print(f"{outcome.planned.case.title}: {text}", flush=True)


def wanted_cases(options: argparse.Namespace, num_ranks: int | None, device_type: str, cores: int) -> list[Case]:
    """The cases of the command line, for the number of ranks that there are, or that can be forked."""
    counts = [num_ranks] if num_ranks else options.ranks
    cases: list[Case] = []
    for size in map(size_of, options.recipes):
        if options.case:
            cases += custom_cases(size, options.case, num_ranks)
        else:
            for count in counts:
                cases += default_cases(size, count, device_type, cores)
    if options.cases:
        cases = selected(cases, options.cases)
    return with_steps(cases, options.steps)


def out_path(options: argparse.Namespace) -> Path | None:
    """Where results go, without suffix; None = nowhere. Only the whole sweep replaces the published one."""
    if options.out is not None:
        return options.out
    asked = (options.recipes, options.cases, options.case, options.ranks, options.threads)
    whole = asked == (list(SIZES), [], [], list(FORKED_RANKS), None)
    return DEFAULT_OUT if whole and not torch.cuda.is_available() and "TORCHELASTIC_RUN_ID" not in os.environ else None


def print_cases(groups: list[list[PlannedCase]]) -> None:
    """The cases with the words that make them, and whether they are possible."""
    for group in groups:
        case = group[0].case
        print(f"{case.size.name} / {case.group}: {' '.join(case.size.words)}")
        for planned in group:
            refused = f"  refused: {' '.join(planned.reasons)}" if planned.plan is None else ""
            print(f"  {planned.case.name:32} {' '.join(planned.case.words)}{refused}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = " and ".join(SIZES)
    parser.add_argument("--recipes", nargs="+", default=list(SIZES), help=f"{names} (the default), or TOML files")
    parser.add_argument("--cases", nargs="+", default=[], help="only cases with one of these in their names")
    parser.add_argument("--case", action="append", default=[], metavar="'NAME=--KEY VALUE ...'", help="one of your own")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(FORKED_RANKS), help="without torchrun: how many")
    parser.add_argument("--threads", type=int, help="of each rank; default cores / ranks")
    parser.add_argument("--steps", type=int, help="in a timed stretch; default by size")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before each stretch (and a first one)")
    parser.add_argument("--repeats", type=int, default=3, help="timed stretches of each case")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one stretch may take")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    options = parser.parse_args(argv)
    for size in map(size_of, options.recipes):
        try:
            custom_cases(size, options.case, 1)
        except ValueError as error:
            parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
