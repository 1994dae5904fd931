"""What the growth study trains: trunks, and the budgets at which each is annealed.

A *trunk* is a run in the stable phase of warmup-stable-decay, from scratch or grown. Every budget is an *end*: a
cool-down over the last fifth, branched from the trunk by `titan_growth branch`, a run of its own. So an end at T steps
costs what a whole run of T steps costs, warmup, stable phase and decay, and a trunk pays for the steps that its ends
share only once. Numbers of steps are the same at both scales: 4,096 tokens each for a CPU, 16,384 for a GPU.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT
from titan_growth.config.loader import load_recipe
from titan_growth.growth.chain import chain_of
from titan_growth.models.registry import model_config_of
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many

DECAY = 0.2
SMALL_BUDGET = 1000
"""Steps of the runs that tune."""
BUDGETS = (1600, 2100, 2600, 3200, 4000)
"""Steps of the ends of the headline. 2,600 is 65 % of the largest: what 54.6 % more speed leaves."""
SCRATCH_BUDGETS = (800, 1000, 1300, *BUDGETS)
"""Steps of the ends of the baseline; the first ones are for the losses of the runs that tune."""
WARMUP = 100
"""Steps of warmup that the recipes have."""
SCRATCH, GROWN = "from scratch", "grown"
SEEDS = (1, 2, 3)
STACK = {"operator": "stack", "factor": 4, "optimizer_state": "asymmetric", "lr_policy": "continue"}
"""The growth of the headline."""


@dataclass(frozen=True)
class Scale:
    """A size of model that the study is made at."""

    recipe: Path
    result: Path
    rates: tuple[float, ...]
    """The grid of peak learning rates."""
    untuned_lr: float
    """A usual one for this width, which a user has who tunes nothing."""
    dim: int
    """Width of the model."""
    usual_flops_per_second: float
    """Of one job, until there are results to go by."""


def _scale(name: str, result: str, **facts: Any) -> Scale:
    return Scale(ROOT / "train_configs" / f"{name}.toml", ROOT / "benchmarks" / "results" / f"{result}.json", **facts)


SCALES = {
    "cpu": _scale(
        "study_12x64",
        "growth_study",
        rates=(2e-3, 4e-3, 8e-3, 16e-3),
        untuned_lr=4e-3,
        dim=64,
        usual_flops_per_second=6e10,
    ),
    "cuda": _scale(
        "study_12x512",
        "growth_study_cuda",
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
        untuned_lr=1e-3,
        dim=512,
        usual_flops_per_second=3e14,
    ),
}
"""By the device that has the speed for it."""


@dataclass(frozen=True)
class Trunk:
    """A run without its decay, and the steps at which it is to end with one.

    Attributes:
        study: the table that it belongs to.
        arm: what it is called there; trunks of one arm differ in their seed alone.
        words: overrides of the recipe, as command-line words.
        ends: last steps of its cool-downs, rising.
        is_whole: it is no trunk but one run to its one end under the schedule of its words.
    """

    study: str
    arm: str
    words: tuple[str, ...]
    ends: tuple[int, ...]
    seed: int = 1
    is_whole: bool = False
    scale: Scale = SCALES["cpu"]

    @property
    def stems(self) -> tuple[int, ...]:
        """The step at which each cool-down leaves the trunk."""
        return tuple(end - cool_down_steps(end) for end in self.ends)

    @property
    def interval(self) -> int:
        """Steps between checkpoints, so that every stem has one."""
        return math.gcd(*self.stems)

    def key(self, end: int) -> str:
        """What a run is known by: its recipe, the words, the seed and its end; not its name."""
        recipe = self.scale.recipe.read_text(encoding="utf-8")
        facts = [recipe, self.words, self.seed, end, None if self.is_whole else DECAY]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def flops_of(self, end: int) -> float:
        """FLOPs of the run that ends there, all models together; as if grown at half where no step is given."""
        recipe = load_recipe(["--job.config_file", str(self.scale.recipe), *self.words])
        target = model_config_of(recipe.model, found := Findings())
        chain = chain_of(recipe.growth, target, found)
        assert chain is not None, found.problems
        moments = [re.fullmatch(r"(\d+) steps", stage.at) for stage in recipe.growth.active_stages]
        grown_at = [min(int(moment[1]) if moment else end // 2, end) for moment in moments]
        edges = [0, *grown_at, end]
        steps = [after - before for before, after in itertools.pairwise(edges)]
        seq_len, num_sequences = recipe.training.seq_len, recipe.training.global_batch_size
        per_token = [config.flops_per_token(seq_len) for config in chain.configs]
        return sum(count * num_sequences * seq_len * each for count, each in zip(steps, per_token, strict=True))

    def flops_left(self, done: Container[str]) -> float:
        """FLOPs that it takes to train what is not done: the trunk as far as it is needed, and the cool-downs."""
        if self.is_whole:
            return sum(self.flops_of(end) for end in self.ends if self.key(end) not in done)
        left = [(end, stem) for end, stem in zip(self.ends, self.stems, strict=True) if self.key(end) not in done]
        decays = sum(self.flops_of(end) - self.flops_of(stem) for end, stem in left)
        return self.flops_of(left[-1][1]) + decays if left else 0.0


def cool_down_steps(end: int) -> int:
    """Steps of the decay of a run of so many steps."""
    return round(DECAY * end)


@dataclass(frozen=True)
class Choice:
    """What is tuned: peak learning rate, initial weights, warmup; for a grown run also the base's rate, as a multiple.

    `base` is None for a model that is trained from scratch.
    """

    lr: float
    scheme: str
    base: float | None = None
    warmup_steps: int = WARMUP

    @property
    def side(self) -> str:
        return SCRATCH if self.base is None else GROWN

    @property
    def name(self) -> str:
        """What it is called in the table of the tuning."""
        base = "" if self.base is None else f", base x {self.base:g}"
        warmup = "" if self.warmup_steps == WARMUP else f", warmup {self.warmup_steps}"
        return f"{self.side}, {self.scheme}, lr {self.lr:g}{base}{warmup}"

    def words(self, *growths: dict[str, Any], more: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Words of the recipe. A grown run says of each growth what differs from `STACK`, the step `at` at least."""
        warmup = () if self.warmup_steps == WARMUP else ("--lr_scheduler.warmup_steps", str(self.warmup_steps))
        common = ("--optimizer.lr", f"{self.lr:g}", "--model.init.scheme", self.scheme, *warmup, *more)
        if self.base is None:
            return ("--growth.enable", "false", *common)
        stages = [{**STACK, "lr": self.lr, **growth} for growth in growths]
        return ("--growth.base.lr", f"{self.base * self.lr:g}", "--growth.stages", _inline(stages), *common)


def _inline(tables: list[dict[str, Any]]) -> str:
    """Tables as TOML writes them on one line, without the keys that are None. JSON's strings and numbers are TOML's."""
    rows = []
    for table in tables:
        pairs = (f"{key} = {_value(value)}" for key, value in table.items() if value is not None)
        rows.append(f"{{{', '.join(pairs)}}}")
    return f"[{', '.join(rows)}]"


def _value(value: Any) -> str:
    return _inline([value])[1:-1] if isinstance(value, dict) else json.dumps(value)


def steps(number: int) -> str:
    """A moment as recipes give it."""
    return f"{number} steps"


def headline(best: dict[str, Choice]) -> Iterator[Trunk]:
    """Frontiers of both sides, each trunk grown at half of its largest budget; three seeds."""
    for seed in SEEDS:
        yield Trunk("headline", SCRATCH, best[SCRATCH].words(), SCRATCH_BUDGETS, seed)
        for at, ends in ((2000, (3200, 4000)), (1000, (1600, 2100))):
            yield Trunk("headline", GROWN, best[GROWN].words({"at": steps(at)}), ends, seed)


def controls(best: dict[str, Choice]) -> Iterator[Trunk]:
    """What could kill the claim: other ways to the same loss, with nothing of the small model in the large one.

    Models of other depths, each at the FLOPs of 12 layers at 2,600 steps, at the rate tuned for 12 and at twice that;
    3 layers at the tokens of 4,000 steps too, which is the small model continued.
    """
    for layers, ends in ((6, (5000,)), (3, (4000, 9000)), (1, (20000,))):
        for multiple in (1, 2):
            choice = replace(best[SCRATCH], lr=multiple * best[SCRATCH].lr)
            words = choice.words(more=("--model.n_layers", str(layers)))
            yield Trunk("controls", f"{many(layers, 'layer')} {SCRATCH}, lr {choice.lr:g}", words, ends)
    masked = {"at": steps(2000), "operator": "random_depth", "mask_steps": 200}
    yield Trunk("controls", "nothing copied: random_depth", best[GROWN].words(masked), (3200, 4000))
    yield Trunk("controls", "grown untrained, at step 1", best[GROWN].words({"at": steps(1)}), BUDGETS[-2:])
    cosine = ("--lr_scheduler.decay_type", "cosine", "--lr_scheduler.decay_ratio", "0.975")
    for side, growths in ((SCRATCH, ()), (GROWN, ({"at": steps(2000)},))):
        words = best[side].words(*growths, more=cosine)
        yield Trunk("controls", f"{side}, cosine", words, (BUDGETS[-1],), is_whole=True)
