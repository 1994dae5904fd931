"""How large activations are in models of several sizes, and how that changes over the first steps.

Under a parametrisation that transfers, neither an activation nor its change by a step depends on width or depth (the
coordinate check of Yang et al., Tensor Programs V, app. D.1). Every step sees the same batch of random tokens, so
updates and activations are as aligned as they ever get.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from titan_growth.config.schema.optimizer import OptimizerConfig
from titan_growth.engine.optimizer import Optimizer
from titan_growth.engine.parameter_groups import SizedModel
from titan_growth.models.config import DecoderConfig
from titan_growth.models.decoder import Decoder, cross_entropy_sum
from titan_growth.models.initialize import init_weights
from titan_growth.models.registry import family_module
from titan_growth.optimizers.base import Site

GROUPS = ("embedding", "attention", "mlp", "residual", "logits")
"""What is measured: outputs of the embedding, of all attentions, of all SwiGLUs and of all blocks, and the logits."""


@dataclass(frozen=True)
class Coordinates:
    """The activations of a model after some steps."""

    step: int
    loss: float
    rms: dict[str, float]
    """Root of the mean square, by group."""
    change: dict[str, float]
    """That of the difference to step 0."""


@dataclass(frozen=True)
class Trial:
    """How each model is trained."""

    family: str
    optimizer: OptimizerConfig
    max_norm: float
    steps: int
    batch_size: int
    seq_len: int
    seed: int
    device: torch.device


def sized(config: DecoderConfig, width: int, depth: int) -> DecoderConfig | str:
    """A model of another size, with its proportions and heads as wide; or why there is none."""
    heads, group = width * config.num_heads // config.dim, config.num_heads // config.num_kv_heads
    if heads == 0 or heads * config.dim != width * config.num_heads or heads % group:
        return (
            f"a width of {width} has no whole number of heads like those of the model, {config.num_heads} with "
            f"{config.num_kv_heads} key/value heads at dim {config.dim}"
        )
    return replace(
        config,
        dim=width,
        num_layers=depth,
        num_heads=heads,
        num_kv_heads=heads // group,
        hidden_dim=round(config.hidden_dim * width / config.dim),
    )


def measured(config: DecoderConfig, trial: Trial) -> list[Coordinates]:
    """Trains a model and measures it before the first step and after each."""
    module = family_module(trial.family)
    model: Decoder = module.Decoder(config, trial.seq_len).to(trial.device)
    model.materialized(trial.device)
    init_weights([model], lambda name: module.init_rule(config, name), trial.seed, config.tied)
    optimizer = Optimizer(
        [model],
        trial.optimizer,
        max_norm=trial.max_norm,
        site=Site(trial.device),
        tied=config.tied,
        model=SizedModel(config, module.ROLES),
    )
    generator = torch.Generator().manual_seed(trial.seed)
    tokens = torch.randint(0, config.vocab_size, (trial.batch_size, trial.seq_len + 1), generator=generator)
    inputs, labels = tokens[:, :-1].to(trial.device), tokens[:, 1:].to(trial.device)
    seen = _Activations(model)
    found: list[Coordinates] = []
    for step in range(trial.steps + 1):
        logits = model(inputs)
        loss = cross_entropy_sum(logits, labels).sum() / labels.numel()
        found.append(seen.taken(step, logits, loss.item()))
        if step < trial.steps:
            loss.backward()
            optimizer.clip()
            optimizer.step(trial.optimizer.lr)
    return found


class _Activations:
    """Keeps the outputs of a model's modules, by group."""

    def __init__(self, model: Decoder) -> None:
        self._kept: dict[str, list[Tensor]] = {}
        self._first: dict[str, list[Tensor]] = {}
        assert model.tok_embeddings is not None, "a whole model"
        self._keep("embedding", model.tok_embeddings)
        for layer in model.layers.values():
            self._keep("attention", layer.get_submodule("attention"))
            self._keep("mlp", layer.get_submodule("feed_forward"))
            self._keep("residual", layer)

    def _keep(self, group: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self._kept.setdefault(group, []).append(output.detach())

        module.register_forward_hook(hook)

    def taken(self, step: int, logits: Tensor, loss: float) -> Coordinates:
        """Sizes and changes of what the last forward pass left; the first one is what later ones are compared with."""
        now = {**self._kept, "logits": [logits.detach()]}
        self._kept = {}
        self._first = self._first or now
        changed = {
            group: [new - old for new, old in zip(now[group], self._first[group], strict=True)] for group in GROUPS
        }
        return Coordinates(
            step,
            loss,
            {group: _rms(now[group]) for group in GROUPS},
            {group: _rms(changed[group]) for group in GROUPS},
        )


def _rms(tensors: Sequence[Tensor]) -> float:
    """Root of the mean square over tensors of one shape."""
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).mean().sqrt().item()


@dataclass(frozen=True)
class Scan:
    """Models that differ in one size."""

    axis: str
    """"width" or "depth"."""
    fixed: str
    """The other size, in words."""
    sizes: list[int]
    coordinates: list[list[Coordinates]]
    """Of each size, by step."""

    def values(self, kind: str, group: str, step: int) -> list[float]:
        """Of each size; kind is "rms" or "change"."""
        return [float(getattr(of_size[step], kind)[group]) for of_size in self.coordinates]

    def exponent(self, kind: str, group: str, step: int) -> float:
        """The power of the size that the values go with, by least squares over logarithms; NaN where one is 0."""
        values = self.values(kind, group, step)
        if min(values) <= 0.0 or len(values) < 2:
            return math.nan
        xs, ys = [math.log(size) for size in self.sizes], [math.log(value) for value in values]
        return statistics.linear_regression(xs, ys).slope

    def lines(self) -> Iterator[str]:
        """The table of sizes and changes after the last step."""
        last = len(self.coordinates[0]) - 1
        yield f"{self.axis}, {self.fixed}: root mean square of activations, and of their change, after step {last}"
        yield "  " + f"{'':20}" + "".join(f"{size:>11}" for size in self.sizes) + f"{'exponent':>11}"
        for kind in ("rms", "change"):
            for group in GROUPS:
                exponent = self.exponent(kind, group, last)
                values = "".join(f"{value:>11.4g}" for value in self.values(kind, group, last))
                shown = f"{'' if math.isnan(exponent) else f'{exponent:+.2f}':>11}"
                yield f"  {group + (', change' if kind == 'change' else ''):20}{values}{shown}"
        losses = "".join(f"{of_size[last].loss:>11.4f}" for of_size in self.coordinates)
        yield f"  {'loss':20}{losses}"
