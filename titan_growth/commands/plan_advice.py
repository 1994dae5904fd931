"""What is known about growths like those of a plan: what they are worth, and what has failed before.

The worth is arithmetic: the FLOPs of the plan against those of as many tokens at the last size. It holds if the grown
model learns as much from a token as one from scratch, and shrinks with what it learns less. Each remark says what it
rests on: measured here (`benchmarks/results`), the paper (Du et al., NeurIPS 2024), or others' measurements by their
arXiv number. Remarks change nothing about a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from titan_growth.config.schema.growth import PlannedGrowth
from titan_growth.models.config import DecoderConfig
from titan_growth.run.lr_schedule import LRSchedule

LARGEST_USUAL_FACTOR = 4
LATE_SHARE_OF_RATE = 0.5
"""Share of the peak learning rate below which a growth that does not restart it comes late."""
MATURE_TOKENS_PER_PARAMETER = 20


def worth(tokens: int, flops: int, target_flops_per_token: int) -> str:
    """What a run costs against one from scratch, at equal tokens.

    Args:
        tokens: of the whole run.
        flops: of the whole run, all sizes together.
        target_flops_per_token: of the last model.
    """
    ratio = tokens * target_flops_per_token / flops
    return (
        f"{1 - 1 / ratio:.1%} fewer FLOPs than as many tokens from scratch: a speedup of {ratio - 1:.1%} if the loss "
        f"is equal, and none if growing needs {ratio:.2f} times the tokens"
    )


def remarks(
    planned: Sequence[PlannedGrowth],
    models: Sequence[DecoderConfig],
    grown_at: Sequence[int],
    tokens: Sequence[int],
    schedule: LRSchedule,
) -> Iterator[str]:
    """What is known about growths like these, and what it rests on; nothing where nothing speaks against them.

    Args:
        models: before the first growth and after each one.
        grown_at: the step of each growth.
        tokens: trained on until each growth, from the start of the run.
    """
    sizes = itertools.pairwise(models)
    for number, (growth, (before, after), step) in enumerate(zip(planned, sizes, grown_at, strict=True)):
        where = f"growth at step {step:,}: "
        deeper = after.num_layers > before.num_layers
        rate = schedule(step, grown_at[:number])
        peak = schedule.segment(step, grown_at[:number]).peak_lr
        late = schedule.stands(step, grown_at[:number]) == "decay" and rate < LATE_SHARE_OF_RATE * peak
        if late and deeper and growth.lr_policy != "restart":
            yield (
                f"{where}the decay has brought the learning rate to {rate / peak:.0%} of its peak. Late growths pay in "
                "a stable phase (lr_scheduler.decay_ratio); under a cosine one at half of the run ended above the run "
                "from scratch (measured: benchmarks/results/growth_pays.md; arXiv 2511.04981)"
            )
        if growth.optimizer_state == "reset" and growth.lr_policy == "continue":
            yield (
                f"{where}moments are reset and no warmup follows. reset goes with restart (official G_stack), continue "
                "with copy or asymmetric (arXiv 2602.02472)"
            )
        if before.num_layers > 1 and after.num_layers > LARGEST_USUAL_FACTOR * before.num_layers:
            yield (
                f"{where}{after.num_layers / before.num_layers:.3g} times the layers. Du et al. found factors of 2 to "
                "4 best; under tuned controls 2 is the surest (arXiv 2605.13405)"
            )
        maturity = tokens[number] / before.num_params
        if growth.operator == "stack" and deeper and maturity > MATURE_TOKENS_PER_PARAMETER:
            yield (
                f"{where}the base has seen {maturity:.0f} tokens per parameter. Beyond about "
                f"{MATURE_TOKENS_PER_PARAMETER}, interpose does better than stack (arXiv 2510.08008)"
            )
    if sum(after.num_layers > before.num_layers for before, after in itertools.pairwise(models)) > 1:
        yield "several growths in depth: one is as good as several, and cheaper to tune (arXiv 2511.04981)"
