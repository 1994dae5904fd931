"""What `throughput.py` writes: figures of each case from its samples, as JSON and as a page of tables."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.throughput_cases import PlannedCase
from benchmarks.throughput_running import PHASES, RankSample
from titan_growth.metrics.formatting import format_rate
from titan_growth.run.plan import RunPlan, stage_lines

LOSSES_AGREE = 0.02
"""Relative difference from which on losses of one precision are not rounding any more."""


@dataclass
class Outcome:
    """What became of a case: samples (one list of ranks for each repeat), or the reason why there are none."""

    planned: PlannedCase
    threads: int
    samples: list[list[RankSample]] = field(default_factory=list)
    reason: str = ""
    """Why it was refused or failed; empty when it was measured."""

    @property
    def status(self) -> str:
        """measured, refused (by the plan: nothing was started) or failed."""
        return "refused" if self.planned.plan is None else "failed" if self.reason else "measured"

    @property
    def tokens_per_second(self) -> list[float]:
        """Of all ranks together, one for each repeat. The ranks started together; the last to end counts."""
        return [self.tokens / max(rank["seconds"] for rank in ranks) for ranks in self.samples]

    @property
    def tokens(self) -> int:
        """Of one timed stretch, on all ranks together."""
        assert self.planned.plan is not None, "a refused case has no tokens"
        return self.planned.plan.phase.tokens_per_step * self.planned.case.size.steps

    @property
    def precision(self) -> str:
        """Cases of one precision must come to the same losses.

        One rank computes bfloat16 through autocast, which keeps the residual stream in float32, and several through
        FSDP, which does not (stages/autocast.py): two precisions. Early Adam steps follow the sign of a gradient, so
        rounding alone takes them 1e-3 to 1e-2 apart within ten steps; in float32 one rank and two agree to 1e-7.
        """
        assert self.planned.plan is not None, "a refused case has no precision"
        recipe = self.planned.plan.recipe
        if recipe.model.uses_float8:
            return "float8"
        dtype = recipe.training.mixed_precision_param
        if dtype == recipe.training.dtype:
            return dtype
        return f"{dtype} by {'autocast' if self.planned.plan.phase.mesh_shape.num_ranks == 1 else 'FSDP'}"

    @property
    def num_steps(self) -> int:
        """Steps behind the last loss."""
        return self.samples[-1][0]["num_steps"]

    @property
    def loss(self) -> float:
        """At the end; the same on every rank."""
        return self.samples[-1][0]["loss"]


def environment(device_name: str, cores: int) -> dict[str, Any]:
    """What a figure depends on besides the case."""
    return {
        "device": device_name,
        "cores": cores,
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "openmp": {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ},
    }


def command() -> str:
    """What repeats this sweep."""
    start = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*start, "-m", "benchmarks.throughput", *sys.argv[1:]])


def to_json(groups: list[list[Outcome]], settings: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Everything."""
    return {
        "command": command(),
        "settings": settings,
        "environment": machine,
        "cases": [entry for group in groups for entry in _entries(group, machine["cores"])],
    }


def _entries(group: list[Outcome], cores: int) -> Iterator[dict[str, Any]]:
    by_name = {outcome.planned.case.name: outcome for outcome in group}
    for outcome in group:
        case, plan = outcome.planned.case, outcome.planned.plan
        oversubscribed = case.ranks * outcome.threads > cores
        entry: dict[str, Any] = {
            "size": case.size.name,
            "group": case.group,
            "name": case.name,
            "status": outcome.status,
            "reasons": list(outcome.planned.reasons) or [outcome.reason] * bool(outcome.reason),
            "ranks": case.ranks,
            "steps_per_stretch": case.size.steps,
            "threads_per_rank": outcome.threads,
            "oversubscribed": oversubscribed,
            "overrides": shlex.join(outcome.planned.words),
        }
        if plan is not None:
            entry |= _facts(plan)
        if plan is not None and outcome.status == "measured":
            baseline, without = by_name[group[0].planned.case.name], by_name.get(case.adds_to)
            entry |= _figures(outcome, plan, _peak(group, outcome), baseline, without or baseline, oversubscribed)
        yield entry


def _facts(plan: RunPlan) -> dict[str, Any]:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "mesh": str(plan.phase.mesh_shape),
        "stages": stage_lines(plan.phase, device_type),
        "parameters": plan.target.num_params,
        "flops_per_token": plan.target.flops_per_token(plan.recipe.training.seq_len),
        "tokens_per_step": plan.phase.tokens_per_step,
        "accumulation_steps": plan.phase.num_accumulation_steps,
    }


def _peak(group: list[Outcome], outcome: Outcome) -> float:
    """FLOP/s of all ranks together: the best that was measured for this type, for it is the same hardware."""
    alike = [other for other in group if other.status == "measured" and _compute(other) == _compute(outcome)]
    return max(sum(rank["peak_flops"] for rank in ranks) for other in alike for ranks in other.samples)


def _compute(outcome: Outcome) -> str:
    assert outcome.planned.plan is not None, "a refused case computes nothing"
    return outcome.planned.plan.recipe.training.mixed_precision_param


def _figures(
    outcome: Outcome, plan: RunPlan, peak: float, baseline: Outcome, without: Outcome, oversubscribed: bool
) -> dict[str, Any]:
    speeds = outcome.tokens_per_second
    speed = median(speeds)
    flops_per_token = plan.target.flops_per_token(plan.recipe.training.seq_len)
    first = outcome.samples[0]
    return {
        "tokens_per_second": speed,
        "tokens_per_second_per_rank": speed / outcome.planned.case.ranks,
        "spread": (max(speeds) - min(speeds)) / speed,
        "baseline": baseline.planned.case.name,
        "ratio": _ratio(outcome, baseline),
        "without": without.planned.case.name,
        "ratio_to_without": _ratio(outcome, without),
        # Ranks that share a core measure a peak of their luckiest moments, of which nothing should be a fraction.
        "mfu": None if oversubscribed else speed * flops_per_token / peak,
        "peak_flops": None if oversubscribed else peak,
        "peak_source": first[0]["peak_source"],
        "memory_gib": max(rank["memory_gib"] for ranks in outcome.samples for rank in ranks),
        "memory_gib_by_rank": [
            max(ranks[rank]["memory_gib"] for ranks in outcome.samples) for rank in range(len(first))
        ],
        "phase_seconds": {
            name: median(_mean(rank["phase_seconds"][name] for rank in ranks) for ranks in outcome.samples)
            for name in PHASES
        },
        "build_seconds": max(rank["build_seconds"] for rank in first),
        "first_step_seconds": max(rank["first_step_seconds"] for rank in first),
        "loss": outcome.loss,
        "num_steps": outcome.num_steps,
        "precision": outcome.precision,
        "samples": [
            {
                "seconds": max(rank["seconds"] for rank in ranks),
                "tokens": outcome.tokens,
                "tokens_per_second": speed_of_sample,
                "phase_seconds_by_rank": [rank["phase_seconds"] for rank in ranks],
            }
            for ranks, speed_of_sample in zip(outcome.samples, speeds, strict=True)
        ],
    }


def _ratio(outcome: Outcome, other: Outcome) -> float | None:
    """Median of the ratios within each repeat: what slows the machine down for a while slows down both."""
    if other.status != "measured":
        return None
    pairs = zip(outcome.tokens_per_second, other.tokens_per_second, strict=True)
    return median(speed / other_speed for speed, other_speed in pairs)


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


# ---- the page --------------------------------------------------------------------------------------------------------

HOW_TO_READ = """
All cases of a size train the same model on the same global batches of synthetic tokens, through the trainer's own
loader, engine and optimizer; {how}. The cases of a table are measured in turns (A B C A B C), with untimed steps before
each timed stretch. tokens/s is of all ranks together and the median of {repeats} stretches, spread is (largest -
smallest) / median. Ratios are taken turn by turn, to the first case of the table and to the case without what this one
adds, and the median is shown. MFU is model FLOPs, without recomputation, over the {peak}. Memory is the peak of the
timed steps on the rank that has the most, {memory}. Phases are shares of a step, averaged over the ranks; waiting for
other ranks counts where it happens. The first step includes compilation.
"""


def page(document: dict[str, Any]) -> str:
    """The Markdown page of what `to_json` made."""
    machine, settings = document["environment"], document["settings"]
    on_cpu = machine["device"].startswith("CPU")
    load = machine["load_at_start"]
    text = [
        "# Throughput\n",
        f"`{document['command']}` on {machine['cores']} cores ({machine['machine']}), {machine['device']}, torch "
        f"{machine['torch']}; load {load:.1f} at the start.\n"
        if load is not None
        else f"`{document['command']}` on {machine['device']}, torch {machine['torch']}.\n",
        " ".join(HOW_TO_READ.split()).format(
            repeats=settings["repeats"],
            how="each has ranks of its own" if settings["forked"] else "each is built anew for every stretch",
            peak="matmul peak measured on all ranks at once" if on_cpu else "peak of the devices",
            memory="resident, Python and libraries included" if on_cpu else "active in the allocator",
        )
        + "\n",
    ]
    sizes = dict.fromkeys(entry["size"] for entry in document["cases"])
    for size in sizes:
        entries = [entry for entry in document["cases"] if entry["size"] == size]
        known = next((entry for entry in entries if "parameters" in entry), None)
        text.append(f"## {size}" + (f": {known['parameters'] / 1e6:,.1f}M parameters, " if known else ""))
        if known:
            text[-1] += f"{known['tokens_per_step']:,} tokens a step\n"
        for group in dict.fromkeys(entry["group"] for entry in entries):
            text += _table([entry for entry in entries if entry["group"] == group], machine["cores"])
        text += _losses(entries)
    return "\n".join(text)


def _table(entries: list[dict[str, Any]], cores: int) -> list[str]:
    ranks, threads = entries[0]["ranks"], entries[0]["threads_per_rank"]
    lines = [f"### {entries[0]['group']}, {threads} thread{'s' if threads > 1 else ''} each\n"]
    if entries[0]["oversubscribed"]:
        lines.append(
            f"{ranks} ranks of {threads} thread{'s' if threads > 1 else ''} on {cores} cores: no claim about speed. It "
            "shows that a case runs, what it holds in memory, and which phase costs what while ranks wait for a core.\n"
        )
    measured = [entry for entry in entries if entry["status"] == "measured"]
    if measured:
        rows = [_row(entry) for entry in measured]
        # Columns that say nothing in this table (there is one rank, nothing adds to another case) are left out.
        columns = [name for name in rows[0] if any(row[name] for row in rows)]
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows]
        peaks = {entry["peak_source"].split(" peak")[0]: entry["peak_flops"] for entry in measured if entry["mfu"]}
        if peaks:
            named = [f"{kind} {format_rate(peak)}" for kind, peak in peaks.items()]
            lines.append(f"\nPeak of all ranks: {', '.join(named)}.")
    lines += [
        f"\n{entry['name']}: **{entry['status']}**. {' '.join(entry['reasons'])}"
        for entry in entries
        if entry["status"] != "measured"
    ]
    return [*lines, ""]


def _row(entry: dict[str, Any]) -> dict[str, str]:
    phases = entry["phase_seconds"]
    shares = {name: f"{phases[name] / sum(phases.values()):.1%}" for name in PHASES}
    claims = not entry["oversubscribed"]
    adds = entry["without"] != entry["baseline"]
    return {
        "case": entry["name"],
        "tokens/s": f"{entry['tokens_per_second']:,.0f}",
        "per rank": f"{entry['tokens_per_second_per_rank']:,.0f}" if entry["ranks"] > 1 else "",
        "spread": f"{entry['spread']:.0%}",
        "ratio": _ratio_text(entry["ratio"]) if claims else "",
        "to the case without": _ratio_text(entry["ratio_to_without"]) if claims and adds else "",
        "MFU": f"{entry['mfu']:.1%}" if entry["mfu"] is not None else "",
        "memory, GiB": f"{entry['memory_gib']:.2f}",
        "data": shares["data"],
        "forward, backward": shares["forward_backward"],
        "clip, optimizer": shares["optimizer"],
        "first step, s": f"{entry['first_step_seconds']:.1f}",
        "loss": f"{entry['loss']:.4f}",
    }


def _ratio_text(ratio: float | None) -> str:
    return "?" if ratio is None else f"{ratio:.2f}"


def _losses(entries: list[dict[str, Any]]) -> list[str]:
    """A sentence for each precision: whether all cases have trained the same model."""
    alike: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["status"] == "measured":
            alike.setdefault((entry["precision"], entry["num_steps"]), []).append(entry)
    sentences = []
    for (precision, num_steps), group in alike.items():
        losses = [entry["loss"] for entry in group]
        middle = median(losses)
        off = [entry["name"] for entry in group if abs(entry["loss"] - middle) > LOSSES_AGREE * middle]
        verdict = f"**off: {', '.join(off)}**" if off else f"{(max(losses) - min(losses)) / middle:.1e} apart"
        many = f"{len(group)} case{'s' if len(group) > 1 else ''}"
        between = f"{min(losses):.4f} to {max(losses):.4f}"
        sentences.append(f"- {precision}, {many}, after {num_steps} steps: {between}, {verdict}")
    return ["Losses, which must not depend on the case:\n", *sentences, ""] if sentences else []
