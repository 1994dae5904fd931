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
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.arms import ROOT
from titan_growth.config.loader import load_recipe
from titan_growth.growth.chain import chain_of
from titan_growth.models.registry import model_config_of
from titan_growth.tools.findings import Findings
from titan_growth.tools.text import many

RECIPE = ROOT / "train_configs" / "study_12x64.toml"
DECAY = 0.2
SMALL_BUDGET = 1000
"""Steps of the runs that tune."""
BUDGETS = (1600, 2100, 2600, 3200, 4000)
"""Steps of the ends of the headline. 2,600 is 65 % of the largest: what 54.6 % more speed leaves."""
RATES = (2e-3, 4e-3, 8e-3, 16e-3)
SCHEMES = ("torchtitan", "small")
SCRATCH, GROWN = "from scratch", "grown"
SEEDS = (1, 2, 3)
STAGE = "--growth.stages.0"


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


@dataclass(frozen=True)
class Choice:
    """What is tuned: peak learning rate and initial weights; for a grown run also the base's rate, as a multiple.

    `base` is None for a model that is trained from scratch.
    """

    lr: float
    scheme: str
    base: float | None = None

    @property
    def side(self) -> str:
        return SCRATCH if self.base is None else GROWN

    @property
    def name(self) -> str:
        """What it is called in the table of the tuning."""
        base = "" if self.base is None else f", base x {self.base:g}"
        return f"{self.side}, {self.scheme}, lr {self.lr:g}{base}"

    def words(self, at: int = 0, *more: str) -> tuple[str, ...]:
        """Words of the recipe; a grown run grows after step `at`."""
        common = ("--optimizer.lr", f"{self.lr:g}", "--model.init.scheme", self.scheme, *more)
        if self.base is None:
            return ("--growth.enable", "false", *common)
        rates = ("--growth.base.lr", f"{self.base * self.lr:g}", f"{STAGE}.lr", f"{self.lr:g}")
        return (f"{STAGE}.at", f"{at} steps", *rates, *common)


GRID = [Choice(lr, scheme, base) for scheme in SCHEMES for lr in RATES for base in (None, 1.0, 2.0)]


def tuning() -> Iterator[Trunk]:
    """Both sides on one grid of learning rates and initial weights; for the grown one, also the base's rate."""
    for choice in GRID:
        yield _tuning(choice)


def _tuning(choice: Choice, seed: int = 1) -> Trunk:
    return Trunk("tuning", choice.name, choice.words(SMALL_BUDGET // 2), (SMALL_BUDGET,), seed)


def tuned(ends: Iterable[dict[str, Any]]) -> dict[str, Choice] | None:
    """The best choice of each side by its loss; None before the whole grid has been trained."""
    losses = {entry["key"]: entry["loss"] for entry in ends}
    keys = {choice: _tuning(choice).key(SMALL_BUDGET) for choice in GRID}
    if not losses.keys() >= set(keys.values()):
        return None
    ranked = sorted(GRID, key=lambda choice: losses[keys[choice]])
    return {side: next(choice for choice in ranked if choice.side == side) for side in (SCRATCH, GROWN)}


def headline(best: dict[str, Choice]) -> Iterator[Trunk]:
    """Frontiers of both sides, each trunk grown at half of its largest budget; three seeds."""
    for seed in SEEDS:
        yield Trunk("headline", SCRATCH, best[SCRATCH].words(), BUDGETS, seed)
        for at, ends in ((2000, (3200, 4000)), (1000, (1600, 2100))):
            yield Trunk("headline", GROWN, best[GROWN].words(at), ends, seed)


def controls(best: dict[str, Choice]) -> Iterator[Trunk]:
    """What could kill the claim: other ways to the same loss, with nothing of the small model in the large one."""
    for layers, ends in ((3, (4000, 8000)), (6, (2600, 4000, 6400)), (1, (8000,))):
        words = best[SCRATCH].words(0, "--model.n_layers", str(layers))
        yield Trunk("controls", f"{many(layers, 'layer')} {SCRATCH}", words, ends)
    masked = (f"{STAGE}.operator", "random_depth", f"{STAGE}.mask_steps", "200")
    yield Trunk("controls", "nothing copied: random_depth", best[GROWN].words(2000, *masked), (3200, 4000))
    yield Trunk("controls", "grown untrained, at step 1", best[GROWN].words(1), BUDGETS[-2:])


def trunks(ends: Iterable[dict[str, Any]]) -> list[Trunk]:
    """Everything, in the order in which it is trained. What needs the tuning's winners follows when they are known."""
    best = tuned(ends)
    return [*tuning(), *(() if best is None else (*headline(best), *controls(best)))]
