"""What the growth study trains: trunks, and the budgets at which each is annealed.

A *trunk* is a run in the stable phase of warmup-stable-decay, from scratch or grown. Every budget is an *end*: a
cool-down over the last fifth, branched from the trunk by `titan_growth branch`, a run of its own. So an end at T steps
costs what a whole run of T steps costs, warmup, stable phase and decay, and a trunk pays for the steps that its ends
share only once. Numbers of steps are of 4,096 tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Container, Iterator
from dataclasses import dataclass

from benchmarks.arms import ROOT
from titan_growth.config.loader import load_recipe
from titan_growth.growth.chain import chain_of
from titan_growth.models.registry import model_config_of
from titan_growth.tools.findings import Findings

RECIPE = ROOT / "train_configs" / "study_12x64.toml"
DECAY = 0.2
SMALL_BUDGET = 1000
"""Steps of the runs that tune."""
BUDGETS = (1600, 2100, 2600, 3200, 4000)
"""Steps of the ends of the headline. 2,600 is 65 % of the largest: what 54.6 % more speed leaves."""
RATES = (2e-3, 4e-3, 8e-3, 16e-3)
SCHEMES = ("torchtitan", "small")
SCRATCH, GROWN = "from scratch", "grown"


@dataclass(frozen=True)
class Trunk:
    """A run without its decay, and the steps at which it is to end with one.

    Attributes:
        study: the table that it belongs to.
        arm: what it is called there; trunks of one arm differ in their seed alone.
        words: overrides of the recipe, as command-line words.
        ends: last steps of its cool-downs, rising.
    """

    study: str
    arm: str
    words: tuple[str, ...]
    ends: tuple[int, ...]
    seed: int = 1

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
        facts = [RECIPE.read_text(encoding="utf-8"), self.words, self.seed, end, DECAY]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def flops(self, end: int) -> float:
        """FLOPs of the run that ends there, all models together."""
        recipe = load_recipe(["--job.config_file", str(RECIPE), *self.words])
        target = model_config_of(recipe.model, found := Findings())
        chain = chain_of(recipe.growth, target, found)
        assert chain is not None, found.problems
        grown_at = [min(int(stage.at.removesuffix(" steps")), end) for stage in recipe.growth.active_stages]
        edges = [0, *grown_at, end]
        steps = [after - before for before, after in itertools.pairwise(edges)]
        seq_len, num_sequences = recipe.training.seq_len, recipe.training.global_batch_size
        per_token = [config.flops_per_token(seq_len) for config in chain.configs]
        return sum(count * num_sequences * seq_len * each for count, each in zip(steps, per_token, strict=True))

    def flops_left(self, done: Container[str]) -> float:
        """FLOPs that it takes to train what is not done: the trunk as far as it is needed, and the cool-downs."""
        left = [(end, stem) for end, stem in zip(self.ends, self.stems, strict=True) if self.key(end) not in done]
        return self.flops(left[-1][1]) + sum(self.flops(end) - self.flops(stem) for end, stem in left) if left else 0.0


def cool_down_steps(end: int) -> int:
    """Steps of the decay of a run of so many steps."""
    return round(DECAY * end)


def scratch(lr: float, scheme: str, *more: str) -> tuple[str, ...]:
    """Words of the target trained from scratch."""
    return ("--growth.enable", "false", "--optimizer.lr", f"{lr:g}", "--model.init.scheme", scheme, *more)


def grown(at: int, lr: float, scheme: str, *more: str, base: float = 1.0) -> tuple[str, ...]:
    """Words of a grown run; the base's peak learning rate is `base` times that after the growth."""
    when = ("--growth.stages.0.at", f"{at} steps", "--growth.base.lr", f"{base * lr:g}")
    rate = ("--optimizer.lr", f"{lr:g}", "--growth.stages.0.lr", f"{lr:g}")
    return (*when, *rate, "--model.init.scheme", scheme, *more)


def tuning() -> Iterator[Trunk]:
    """Both sides on one grid of learning rates and initial weights; for the grown one, also the base's rate."""
    end = (SMALL_BUDGET,)
    for scheme in SCHEMES:
        for lr in RATES:
            yield Trunk("tuning", f"{SCRATCH}, {scheme}, lr {lr:g}", scratch(lr, scheme), end)
            for base in (1.0, 2.0):
                words = grown(SMALL_BUDGET // 2, lr, scheme, base=base)
                yield Trunk("tuning", f"{GROWN}, {scheme}, lr {lr:g}, base x {base:g}", words, end)


def trunks() -> list[Trunk]:
    """Everything, in the order in which it is trained."""
    return list(tuning())
