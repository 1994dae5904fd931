"""How the growth study tunes: both sides in the same three rounds, each judged by ends of `SMALL_BUDGET` steps.

First a grid of learning rates and initial weights; for a grown run also of the base's learning rate. Then the best of
each side with a shorter and a longer warmup. Last the best two of each side with two more seeds: the lower mean wins.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.growth_study_runs import GROWN, SCRATCH, SEEDS, SMALL_BUDGET, Choice, Scale, Trunk, steps

SCHEMES = ("torchtitan", "small")
WARMUPS = (50, 200)


@dataclass(frozen=True)
class Tuning:
    """The rounds as far as they have been trained.

    Attributes:
        losses: key of a run -> its loss.
    """

    losses: dict[str, float]
    scale: Scale

    @classmethod
    def of(cls, ends: Iterable[dict[str, Any]], scale: Scale) -> Tuning:
        return cls({entry["key"]: entry["loss"] for entry in ends}, scale)

    @property
    def grid(self) -> list[Choice]:
        """The choices of both sides."""
        rates = self.scale.rates
        return [Choice(lr, scheme, base) for scheme in SCHEMES for lr in rates for base in (None, 1.0, 2.0)]

    @property
    def untuned(self) -> dict[str, Choice]:
        """Side -> what a user has who tunes nothing: a usual rate, and the initial weights of the default."""
        lr = self.scale.untuned_lr
        return {SCRATCH: Choice(lr, "torchtitan"), GROWN: Choice(lr, "torchtitan", 1.0)}

    def trunk(self, choice: Choice, seed: int = SEEDS[0]) -> Trunk:
        """The run that judges a choice; a grown one grows at half of its steps."""
        words = choice.words({"at": steps(SMALL_BUDGET // 2)})
        return Trunk("tuning", choice.name, words, (SMALL_BUDGET,), seed, scale=self.scale)

    def loss(self, choice: Choice, seed: int = SEEDS[0]) -> float | None:
        """None for a run that has not been trained."""
        return self.losses.get(self.trunk(choice, seed).key(SMALL_BUDGET))

    def candidates(self, side: str) -> list[Choice]:
        """What is trained with the first seed: the grid, and the best of it with other warmups once it is known."""
        grid = [choice for choice in self.grid if choice.side == side]
        best = self._best(grid, 1)
        return [*grid, *(replace(one, warmup_steps=warmup) for one in best for warmup in WARMUPS)]

    def finalists(self, side: str) -> list[Choice]:
        """What is trained with all seeds; nothing as long as a candidate is missing."""
        candidates = self.candidates(side)
        return self._best(candidates, 2) if any(one.warmup_steps in WARMUPS for one in candidates) else []

    def winner(self, side: str) -> Choice | None:
        """The finalist with the lower mean loss; None as long as one is missing."""
        means = {}
        for choice in self.finalists(side):
            losses = [loss for seed in SEEDS if (loss := self.loss(choice, seed)) is not None]
            if len(losses) < len(SEEDS):
                return None
            means[choice] = statistics.mean(losses)
        return min(means, key=means.__getitem__, default=None)

    def winners(self) -> dict[str, Choice] | None:
        """Side -> its winner; None before both are known."""
        found = {side: winner for side in (SCRATCH, GROWN) if (winner := self.winner(side))}
        return found if len(found) == 2 else None

    def trunks(self) -> list[Trunk]:
        """The rounds that can be trained, in their order."""
        sides = (SCRATCH, GROWN)
        first = [self.trunk(choice) for choice in self.grid]
        warmups = [self.trunk(one) for side in sides for one in self.candidates(side) if one.warmup_steps in WARMUPS]
        seeds = [self.trunk(one, seed) for side in sides for one in self.finalists(side) for seed in SEEDS[1:]]
        return [*first, *warmups, *seeds]

    def _best(self, choices: list[Choice], number: int) -> list[Choice]:
        """The best so many; none as long as one of them has not been trained."""
        losses = {choice: loss for choice in choices if (loss := self.loss(choice)) is not None}
        return sorted(losses, key=losses.__getitem__)[:number] if len(losses) == len(choices) else []
