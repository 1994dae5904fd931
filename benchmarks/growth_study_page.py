"""The page of the growth study, from its JSON alone.

A table has a row for every arm that has been trained, whatever study trained it: an end is found by its key.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.growth_study_frontier import Speedup, side_of, speedup
from benchmarks.growth_study_pictures import draw_headline, draw_timing
from benchmarks.growth_study_runs import GROWN, SCRATCH, SEEDS, SMALL_BUDGET, Scale, Trunk
from benchmarks.growth_study_spikes import spikes
from benchmarks.growth_study_tables import trunks
from benchmarks.growth_study_tuning import Tuning
from titan_growth.metrics.frontier import Side
from titan_growth.tools.text import many

_INTRODUCTION = """\
# Does growing pay?

Every loss is that of a finished run: annealed over its last fifth, judged on 0.5M tokens of packages that no run has
seen. FLOPs count the whole run: base, head and attention, and the small model's part of a grown run. A speedup is the
FLOPs from scratch over those of the grown run at equal loss, minus one, as Du et al. count theirs (7B: 54.6 %, which
is 35.3 % fewer FLOPs). `python -m benchmarks.growth_study` trains what is left; with `--page` it makes this page anew
from [{json}]({json}), which has each end with its words, seed, commit and machine."""
TITLES = {
    "tuning": "Tuning: both sides on one grid",
    "headline": "(a) The headline",
    "controls": "Controls that could kill the claim",
    "operators": "(b) Operators at equal FLOPs",
    "timing": "(c) When to grow",
    "factor": "(d) From how many layers",
    "policies": "(e) Moments and learning rate after the growth",
    "maturity": "(f) interpose at the moments of (c)",
    "meshes": "(g) Another mesh from the growth on",
    "optimizers": "(i) Muon and CompleteP",
    "paper": "(j) The paper's own protocol",
}


def write_page(results: dict[str, list[dict[str, Any]]], scale: Scale, folder: Path | None = None) -> None:
    """Writes the page and its pictures anew, beside the JSON if no folder is given.

    Args:
        results: "ends", and "repeats", which are ends that were trained once more.
    """
    target = (folder or scale.result.parent) / f"{scale.result.stem}.md"
    target.write_text(page(results, scale), encoding="utf-8")
    study = _Study(results["ends"], scale)
    if picture := study.pictures.get("headline"):
        draw_headline(study.arms("headline"), target.parent / picture)
    if picture := study.pictures.get("timing"):
        draw_timing(study.timing(), target.parent / picture)


def page(results: dict[str, list[dict[str, Any]]], scale: Scale) -> str:
    """All tables, each as far as it has been trained."""
    ends, repeats = results["ends"], results["repeats"]
    study = _Study(ends, scale)
    special: dict[str, Callable[[_Study], list[str]]] = {"tuning": _tuning, "headline": _headline}
    parts = [_INTRODUCTION.format(json=scale.result.name)]
    for name, title in TITLES.items():
        wanted = [trunk for trunk in study.trunks if trunk.study == name]
        total = sum(len(trunk.ends) for trunk in wanted)
        found = sum(len(study.entries(trunk)) for trunk in wanted)
        if found:
            parts.append(f"## {title}")
            if found < total:
                parts.append(f"{found} of {many(total, 'end')} are trained.")
            if picture := study.pictures.get(name):
                parts.append(f"![{title}]({picture})")
            parts += special.get(name, lambda study, name=name: [_table(study, name)])(study)
    if rows := spikes(study.firsts(_WITH_SPIKES)):
        parts += ["## (h) The spike after a growth, and its recovery", *rows]
    if repeats:
        parts += ["## The same runs again", *_again(study, repeats)]
    return "\n\n".join(parts) + "\n"


_WITH_SPIKES = ("headline", "operators", "factor", "policies", "paper")
"""Studies of which the growths are looked at."""


class _Study:
    """What was to be trained, and what has been."""

    def __init__(self, ends: list[dict[str, Any]], scale: Scale) -> None:
        self.by_key = {entry["key"]: entry for entry in ends}
        self.tuning = Tuning.of(ends, scale)
        self.trunks = trunks(ends, scale)
        self.name = scale.result.stem

    def entries(self, trunk: Trunk) -> list[dict[str, Any]]:
        """The ends of a trunk that have been trained."""
        return [self.by_key[key] for end in trunk.ends if (key := trunk.key(end)) in self.by_key]

    @property
    def pictures(self) -> dict[str, str]:
        """Study -> the file of its picture, of those for which enough has been trained."""
        found = {}
        if all(sum(arm == name for arm, _ in self.arms("headline")) > 1 for name in (SCRATCH, GROWN)):
            found["headline"] = f"{self.name}.png"
        if len(self.timing()["stack"]) > 2:
            found["timing"] = f"{self.name}_timing.png"
        return found

    def arms(self, study: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """(arm, last step) -> its ends, one for each seed."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for trunk in self.trunks:
            if trunk.study == study:
                for entry in self.entries(trunk):
                    found.setdefault((trunk.arm, entry["end"]), []).append({**entry, "seed": trunk.seed})
        return found

    def firsts(self, studies: Sequence[str]) -> list[dict[str, Any]]:
        """One end of each arm of some studies, by its name there."""
        arms = [(arm, entries) for name in studies for (arm, _), entries in self.arms(name).items()]
        return [{**entries[0], "arm": arm} for arm, entries in arms]

    def timing(self) -> dict[str, dict[float, list[float]]]:
        """Operator -> share of the steps before the growth -> losses of the seeds."""
        found: dict[str, dict[float, list[float]]] = {"stack": {}, "interpose": {}}
        for study, operator in (("timing", "stack"), ("maturity", "interpose")):
            for (arm, _), entries in self.arms(study).items():
                if share := re.search(r"at (\d+)%$", arm):
                    found[operator][int(share[1]) / 100] = [one["loss"] for one in entries]
        return found

    def side(self, name: str, seed: int) -> Side | None:
        """The ends of one side of the headline with one seed."""
        wanted = [one for one in self.trunks if one.study == "headline" and one.arm == name and one.seed == seed]
        return side_of(name, [entry for trunk in wanted for entry in self.entries(trunk)])

    def speedups(self, entries: Iterable[dict[str, Any]]) -> list[Speedup]:
        """Of each end against the frontier from scratch of its own seed, where that has been trained."""
        return [speedup(side, one) for one in entries if (side := self.side(SCRATCH, one["seed"]))]


def _tuning(study: _Study) -> list[str]:
    parts = [
        f"Ends at {SMALL_BUDGET:,} steps. A grid of learning rates and initial weights; for the grown side also of the"
        " base's rate. Then other warmups for the best of each side, then two more seeds for its best two."
    ]
    for side in (SCRATCH, GROWN):
        untuned_choice = study.tuning.untuned[side]
        if (winner := study.tuning.winner(side)) and (untuned := study.tuning.loss(untuned_choice)) is not None:
            tuned = study.tuning.loss(winner)
            assert tuned is not None, "a winner has been trained"
            parts.append(
                f"Tuning gave the side *{side}* {untuned - tuned:.4f} nats: {untuned:.4f} with {untuned_choice.name}, "
                f"{tuned:.4f} with **{winner.name}** (seed {SEEDS[0]})."
            )
    rows = sorted(study.arms("tuning").items(), key=lambda row: _mean(row[1], "loss"))
    for side in (SCRATCH, GROWN):
        lines = ["| arm | seeds | loss | FLOPs |", "| --- | --- | --- | --- |"]
        for (arm, _), entries in rows:
            if arm.startswith(side):
                lines.append(f"| {arm} | {len(entries)} | {_losses(entries)} | {_mean(entries, 'flops'):.3e} |")
        parts.append("\n".join(lines))
    return parts


def _headline(study: _Study) -> list[str]:
    lines = ["| side | steps | FLOPs | loss of each seed | speedup of each seed | tokens | cheap phase |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for (arm, end), entries in sorted(study.arms("headline").items(), key=lambda row: (row[0][0], row[0][1])):
        found = study.speedups(entries) if arm == GROWN else []
        losses = ", ".join(f"{entry['loss']:.4f}" for entry in entries)
        tokens, cheaper = _factors(one.tokens for one in found), _factors(one.cheaper for one in found)
        flops = f"{_mean(entries, 'flops'):.3e}"
        lines.append(f"| {arm} | {end:,} | {flops} | {losses} | {_percents(found)} | {tokens} | {cheaper} |")
    return ["\n".join(lines), *_sharp_control(study), *_lines(study)]


def _sharp_control(study: _Study) -> list[str]:
    """Grown against from scratch at the same tokens, and at 65 % of them, which is what a speedup of 54.6 % leaves."""
    arms = study.arms("headline")
    rows = []
    for seed in SEEDS:
        losses = {
            (arm, end): one["loss"] for (arm, end), entries in arms.items() for one in entries if one["seed"] == seed
        }
        wanted = [(GROWN, 4000), (SCRATCH, 4000), (SCRATCH, 2600)]
        if all(key in losses for key in wanted):
            rows.append(f"| {seed} | {' | '.join(f'{losses[key]:.4f}' for key in wanted)} |")
    if not rows:
        return []
    head = ["| seed | grown, 4,000 steps | from scratch, 4,000 | from scratch, 2,600 |", "| --- | --- | --- | --- |"]
    return ["The sharp control needs no fit: grown against from scratch at its tokens, and at 65 % of them.",
            "\n".join([*head, *rows])]  # fmt: skip


def _lines(study: _Study) -> list[str]:
    """The lines through all ends, and what the speedups are by them."""
    said = []
    for seed in SEEDS:
        if (side := study.side(SCRATCH, seed)) and (grown := study.side(GROWN, seed)):
            fits = [side.line("flops"), grown.line("flops")]
            entries = [entry for (arm, _), found in study.arms("headline").items() if arm == GROWN for entry in found]
            by_line = [one.by_line - 1 for one in study.speedups([one for one in entries if one["seed"] == seed])]
            said.append(
                f"- seed {seed}: ends are {fits[0].deviation:.4f} nats off the line from scratch, "
                f"{fits[1].deviation:.4f} off the grown one; speedups by the former "
                f"{', '.join(f'{one:+.1%}' for one in by_line)}"
            )
    return (
        ["Lines through all ends of a side, loss over the logarithm of the FLOPs:\n\n" + "\n".join(said)]
        if said
        else []
    )


def _table(study: _Study, name: str) -> str:
    """A row for every arm and last step, with the distance from the tuned grown run of as many steps."""
    tuned = {end: _mean(entries, "loss") for (arm, end), entries in study.arms("headline").items() if arm == GROWN}
    winner = study.tuning.winner(GROWN)
    if winner and (loss := study.tuning.loss(winner)) is not None:
        tuned[SMALL_BUDGET] = loss
    lines = ["| arm | steps | seeds | loss | against tuned growth | FLOPs | speedup against scratch |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for (arm, end), entries in study.arms(name).items():
        first = next((one["loss"] for one in entries if one["seed"] == SEEDS[0]), None)
        against = f"{first - tuned[end]:+.4f}" if first is not None and end in tuned else ""
        lines.append(
            f"| {arm} | {end:,} | {len(entries)} | {_losses(entries)} | {against} | {_mean(entries, 'flops'):.3e} "
            f"| {_percents(study.speedups(entries))} |"
        )
    return "\n".join(lines)


def _again(study: _Study, repeats: list[dict[str, Any]]) -> list[str]:
    """Losses of both times, the seconds of the second, and the speedup in seconds where both sides have them."""
    lines = [
        "| arm | seed | steps | loss | again | seconds | machines |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in repeats:
        first = study.by_key.get(one["key"])
        loss, machine = (f"{first['loss']:.6f}", first["machine"]) if first else ("", "")
        machines = f"{machine}; {one['machine']}" if machine != one["machine"] else machine
        lines.append(
            f"| {one['arm']} | {one['seed']} | {one['end']:,} | {loss} | {one['loss']:.6f} | {one['seconds']:,.0f} "
            f"| {machines} |"
        )
    parts = ["Trained once more on a machine that did nothing else, with one thread.", "\n".join(lines)]
    rates = {one["seed"]: one["flops"] / one["seconds"] for one in repeats if one["arm"] == SCRATCH}
    for one in repeats:
        if one["arm"] == GROWN and one["seed"] in rates and (found := study.speedups([one])):
            needed = found[0].flops * one["flops"] / rates[one["seed"]]
            parts.append(
                f"At {one['end']:,} steps, seed {one['seed']}, the loss of the grown run takes {needed:,.0f} s from "
                f"scratch and {one['seconds']:,.0f} s grown: **{needed / one['seconds'] - 1:+.1%} in seconds**."
            )
    return parts


def _mean(entries: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(entry[key] for entry in entries)


def _losses(entries: Sequence[dict[str, Any]]) -> str:
    """The mean, and the range if there are several."""
    losses = [entry["loss"] for entry in entries]
    mean = f"{statistics.mean(losses):.4f}"
    return mean if len(losses) == 1 else f"{mean} ({min(losses):.4f} to {max(losses):.4f})"


def _percents(found: Sequence[Speedup]) -> str:
    """Speedups of seeds, `*` on those beyond the ends of the baseline; the mean last."""
    if not found:
        return ""
    shown = ", ".join(f"{one.flops - 1:+.1%}{'*' if one.extrapolated else ''}" for one in found)
    return shown if len(found) == 1 else f"{shown}; mean {statistics.mean(one.flops for one in found) - 1:+.1%}"


def _factors(values: Iterable[float]) -> str:
    found = list(values)
    return f"x{statistics.mean(found):.2f}" if found else ""
