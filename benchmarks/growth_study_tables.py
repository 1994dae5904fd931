"""The tables of the growth study beside the headline: each varies one thing about the tuned grown run.

All ends are at `SMALL_BUDGET` steps but where equal FLOPs ask for others. The first seed of every table is trained
before the second seed of any.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.growth_study_runs import (
    GROWN,
    SCRATCH,
    SMALL_BUDGET,
    Choice,
    Scale,
    Trunk,
    controls,
    headline,
    steps,
)
from benchmarks.growth_study_tuning import Tuning

_HALF = SMALL_BUDGET // 2
_COSINE = ("--lr_scheduler.decay_type", "cosine", "--lr_scheduler.decay_ratio", "0.9")
_MATURITIES = (100, 250, 400, _HALF, 600, 750)
_STATES = ("reset", "copy", "asymmetric")
_POLICIES = ("restart", "continue", "rewarm", "rewarm_new")
_TABLE_SEEDS = (1, 2)
_MASK = {"mask_steps": 100}


def trunks(ends: Iterable[dict[str, Any]], scale: Scale) -> list[Trunk]:
    """Everything, in the order in which it is trained. What needs the tuning's winners follows when they are known."""
    tuning = Tuning.of(ends, scale)
    best = tuning.winners()
    if best is None:
        return tuning.trunks()
    grown = best[GROWN]
    tables = (operators(grown, scale), timing(grown), factors(grown), policies(grown), maturity(grown), meshes(grown),
              optimizers(best, scale), paper(grown))  # fmt: skip
    varied = list(itertools.chain(*tables))
    seeded = [replace(trunk, seed=seed) for seed in _TABLE_SEEDS for trunk in varied]
    rest = [*headline(best), *controls(best), *seeded]
    return [*tuning.trunks(), *(replace(trunk, scale=scale) for trunk in rest)]


def operators(grown: Choice, scale: Scale) -> Iterator[Trunk]:
    """(b) Every operator over depth and width, at the FLOPs of `stack`."""
    budget = replace(_small("operators", "stack", grown.words(_at())), scale=scale).flops_of(SMALL_BUDGET)
    depth: dict[str, dict[str, Any]] = {
        "stack": {},
        "interpose": {"operator": "interpose"},
        "middle, from 6 layers": {"operator": "middle", "factor": 2},
        "zero_depth": {"operator": "zero_depth"},
        "random_depth": {"operator": "random_depth", **_MASK},
        "learn": {"operator": "learn", "options": {"steps": 50}, "optimizer_state": "reset"},
        "stack, rescaled to depth": {"rescale_to_depth": True},
        "stack, noise 0.1": {"noise": 0.1},
    }
    width: dict[str, dict[str, Any]] = {
        "split_width": {"operator": "split_width"},
        "split_width, noise 0.1": {"operator": "split_width", "noise": 0.1},
        "zero_width": {"operator": "zero_width"},
        "random_width": {"operator": "random_width", **_MASK},
    }
    for name, growth in depth.items():
        yield _at_flops(f"depth: {name}", grown.words(_at(**growth)), budget, scale)
    for name, growth in width.items():
        yield _at_flops(f"width: {name}", grown.words(_at(factor=2, **growth)), budget, scale)


def timing(grown: Choice) -> Iterator[Trunk]:
    """(c) When to grow: six shares of the run, the paper's law, and the slope of the loss."""
    for step in _MATURITIES:
        yield _small("timing", f"at {step / SMALL_BUDGET:.0%}", grown.words(_at(step)))
    for name, at in (("the paper's law", "auto"), ("slope", "slope 0.1 over 100 steps")):
        yield _small("timing", name, grown.words({"at": at}))


def factors(grown: Choice) -> Iterator[Trunk]:
    """(d) Twelve layers from fewer, in one jump; and in two."""
    for layers in (1, 2, 3, 4, 6):
        yield _small("factor", f"from {layers}", grown.words(_at(factor=12 // layers)))
    nothing: dict[str, Any] = {"operator": "random_depth", "factor": None, "n_layers": 12, **_MASK}
    yield _small("factor", "from 0, random_depth", grown.words(_at(**nothing), more=("--growth.base.n_layers", "0")))
    both = (_at(350, factor=2), _at(600, factor=2))
    yield _small("factor", "from 3 by way of 6", grown.words(*both))


def policies(grown: Choice) -> Iterator[Trunk]:
    """(e) The moments, and the learning rate after the growth, under warmup-stable-decay and under cosine."""
    for schedule, more in (("WSD", ()), ("cosine", _COSINE)):
        for state, policy in itertools.product(_STATES, _POLICIES):
            words = grown.words(_at(optimizer_state=state, lr_policy=policy), more=more)
            yield _small("policies", f"{schedule}, {state}, {policy}", words, is_whole=True)


def maturity(grown: Choice) -> Iterator[Trunk]:
    """(f) `interpose` at the moments at which (c) has `stack`."""
    for step in _MATURITIES:
        yield _small(
            "maturity", f"interpose at {step / SMALL_BUDGET:.0%}", grown.words(_at(step, operator="interpose"))
        )


def meshes(grown: Choice) -> Iterator[Trunk]:
    """(g) Other ranks and another mesh from the growth on: the losses of the run that stays on one."""
    sharded = ("data_parallel_shard_degree", "tensor_parallel_degree")
    for name, degrees in (("FSDP2", (2, 1)), ("TP", (1, 2))):
        parallelism = dict(zip(sharded, degrees, strict=True))
        growth = _at(num_ranks=2, parallelism=parallelism)
        words = grown.words(growth, more=("--training.local_batch_size", "8"))
        yield _small("meshes", f"two ranks from the growth on, {name}", words, is_whole=True)
    yield _small("meshes", "one rank", grown.words(_at()), is_whole=True)


def optimizers(best: dict[str, Choice], scale: Scale) -> Iterator[Trunk]:
    """(i) Muon, and depth-muP, on the grid of rates, from scratch and grown."""
    muon = ("--optimizer.name", "Muon")
    base = ("--model.mup.base_dim", str(scale.dim), "--model.mup.base_n_layers", "3")
    completep = ("--model.parametrization", "completep", *base)
    for name, more in (("Muon", muon), ("CompleteP", completep)):
        for side, lr in itertools.product((SCRATCH, GROWN), scale.rates):
            choice = replace(best[side], lr=lr)
            growths = () if side == SCRATCH else (_at(),)
            yield _small("optimizers", f"{name}, {side}, lr {lr:g}", choice.words(*growths, more=more))


def paper(grown: Choice) -> Iterator[Trunk]:
    """(j) As the paper grows: early, all anew after it, the base at 3.3 times the learning rate."""
    official = {"optimizer_state": "reset", "lr_policy": "restart"}
    for step in (30, 100):
        for name, choice in (("3.3 x", replace(grown, base=3.3)), ("as tuned", grown)):
            words = choice.words(_at(step, **official))
            yield _small("paper", f"at {step / SMALL_BUDGET:.0%}, restart, base's rate {name}", words)


def _at(step: int = _HALF, **growth: Any) -> dict[str, Any]:
    return {"at": steps(step), **growth}


def _small(study: str, arm: str, words: tuple[str, ...], *, is_whole: bool = False) -> Trunk:
    return Trunk(study, arm, words, (SMALL_BUDGET,), is_whole=is_whole)


def _at_flops(arm: str, words: tuple[str, ...], budget: float, scale: Scale) -> Trunk:
    """A run that ends at the multiple of 10 steps whose FLOPs are nearest."""
    trunk = Trunk("operators", arm, words, (), scale=scale)
    grown = trunk.flops_of(_HALF)
    step = trunk.flops_of(_HALF + 1) - grown
    return replace(trunk, ends=(_HALF + 10 * round((budget - grown) / step / 10),))
