"""When a growth comes: every way of writing `at`, resolved to a count of the run.

    "300 steps", "10M tokens", "3e17 FLOPs"     counts from the start of the run, over all depths
    "25%"                                       of training.steps
    "auto"                                      the paper's law, in tokens
    "slope 0.02 over 200 steps"                 when the loss has stopped falling

The law is Eq. 2 of Du et al. (NeurIPS 2024), log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, with N the target's
parameters without embeddings, C = 6 N D the budget in FLOPs and d the tokens at which to grow. It was fitted to models
of 0.4B to 3B and budgets of 8e19 to 1.2e21 FLOPs; far below them it asks for more tokens than the run has. So it is
clamped to a share of the run, and outside the fitted range there is a warning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_growth.config.duration import Duration
from titan_growth.models.config import DecoderConfig

FITTED_PARAMETERS = (0.4e9, 3e9)
FITTED_FLOPS = (8e19, 1.2e21)
SHARE_OF_RUN = (0.01, 0.5)
"""What the law is clamped to: growing later than half-way leaves the grown model too few steps."""


def law_tokens(num_params: float, flops: float) -> float:
    """Tokens after which to grow (Du et al., Eq. 2).

    Args:
        num_params: parameters of the target.
        flops: of the whole run, 6 x parameters x tokens.
    """
    return float(10 ** (0.88 * math.log10(num_params) + 163.27 / math.log10(flops) - 5.74))


@dataclass(frozen=True)
class Advice:
    """The law applied to a run."""

    tokens: int
    """Clamped."""
    law: float
    """Unclamped."""
    num_params: int
    flops: float

    @property
    def doubts(self) -> str:
        """Why the advice is uncertain; empty when it is not."""
        why = []
        low, high = FITTED_PARAMETERS
        if not low <= self.num_params <= high:
            why.append(f"models of {low:.1g} to {high:.1g} parameters, and this one has {self.num_params:.3g}")
        low, high = FITTED_FLOPS
        if not low <= self.flops <= high:
            why.append(f"budgets of {low:.1g} to {high:.2g} FLOPs, and this one is {self.flops:.2g}")
        was_cut = abs(self.law - self.tokens) > 1
        clamped = f"; it asks for {self.law:.3g} tokens, cut to {self.tokens:,}" if was_cut else ""
        return f"the law was fitted to {' and '.join(why)}{clamped}" if why else clamped.removeprefix("; ")


def advise(target: DecoderConfig, run_tokens: int, clamp_tokens: int | None = None) -> Advice:
    """When to grow into `target` within a run of `run_tokens`.

    Args:
        clamp_tokens: of a run that keeps the batch it has before the growth; default run_tokens.
    """
    embeddings = target.vocab_size * target.dim * (1 if target.tie_word_embeddings else 2)
    num_params = max(target.num_params - embeddings, 1)
    flops = 6.0 * num_params * run_tokens
    law = law_tokens(num_params, max(flops, 1e3))
    low, high = (share * (clamp_tokens or run_tokens) for share in SHARE_OF_RUN)
    return Advice(max(1, round(min(max(law, low), high))), law, num_params, flops)


def resolved(at: Duration, target: DecoderConfig, *, steps: int, clamp_tokens: int, run_tokens: int) -> Duration:
    """A point as a count of steps, tokens or FLOPs; a slope stays what it is.

    Args:
        target: the last model of the run.
        steps: training.steps.
        clamp_tokens: tokens of all steps at the batch before the growth.
        run_tokens: tokens of all steps at the last model's batch.
    """
    if at.unit == "percent":
        return Duration(max(1, round(float(at.value) / 100 * steps)), "steps")
    if at.unit == "auto":
        return Duration(advise(target, run_tokens, clamp_tokens).tokens, "tokens")
    return at


def slope(losses: list[float]) -> float:
    """Least-squares fall of a loss over a window of steps, in nats over the whole window (negative: it rises)."""
    n = len(losses)
    if n < 2:
        return math.inf
    middle = (n - 1) / 2
    covariance = sum((step - middle) * loss for step, loss in enumerate(losses))
    variance = sum((step - middle) ** 2 for step in range(n))
    return -covariance / variance * (n - 1)
