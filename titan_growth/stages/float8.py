"""Float8 training of linear layers through torchao.

Each matrix product casts its operands to 8-bit floating point with dynamic scales: one per tensor (`tensorwise`), or
one per row and column (`rowwise`; `rowwise_with_gw_hp` keeps the weight gradient in high precision). On devices without
Float8 products (CPUs, GPUs before Ada and Hopper) torchao emulates them in higher precision, with the same results;
this is automatic, and the plan shows it.

torchao takes seconds to import, so it is imported when the stage is applied, never for a plan.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from titan_growth.config.messages import suggestion
from titan_growth.config.schema.recipe import ModelConfig, ParallelismConfig, TrainingConfig
from titan_growth.config.schema.techniques import Float8Config, QuantizeConfig
from titan_growth.models.decoder import Split
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.logs import logger

MULTIPLE = 16
"""Float8 products need sizes that are multiples of this number."""


@register_stage
@dataclass
class Float8(Stage):
    """Linear layers become torchao's `Float8Linear`."""

    name: ClassVar[str] = "float8"
    after: ClassVar[tuple[str, ...]] = ("pipeline",)

    model: ModelConfig
    quantize: QuantizeConfig
    training: TrainingConfig
    parallelism: ParallelismConfig

    def enabled(self, context: PlanContext) -> bool:
        return self.model.uses_float8

    @property
    def section(self) -> Float8Config:
        """The settings of Float8 itself."""
        return self.quantize.linear.float8

    @property
    def recipe_name(self) -> str:
        """The scaling granularity, with its default."""
        return self.section.recipe_name or "tensorwise"

    def check(self, context: PlanContext) -> Iterator[Problem]:
        if "auto_filter_small_kn" in self.section.filter_fqns:
            message = '"auto_filter_small_kn" is not supported in this version'
            yield Problem("quantize.linear.float8.filter_fqns", message, "Name the layers that stay as they are")
        yield from self._token_problems(context)
        wrong: dict[str, str] = {}
        for name, num_out, num_in in linear_sizes(context):
            everywhere = all(self._keeps(other, context) for other in _in_all_layers(name, context))
            if (num_out % MULTIPLE or num_in % MULTIPLE) and not everywhere:
                wrong.setdefault(name.split(".")[-1], f"{num_in} -> {num_out}")
        if wrong:
            listed = ", ".join(f"{leaf} ({sizes})" for leaf, sizes in wrong.items())
            ranks = " on each tensor-parallel rank" if context.mesh_shape.tp > 1 else ""
            message = f"Float8 needs sizes that are multiples of {MULTIPLE}{ranks}, but the model has {listed}"
            names = ", ".join(f'"{leaf}"' for leaf in wrong)
            yield Problem("model.converters", message, f"Name them in quantize.linear.float8.filter_fqns: [{names}]")
        if self.training.loss_chunk_tokens and not self._keeps("output", context):
            message = "with training.loss_chunk_tokens the head computes the loss itself and cannot be a Float8 layer"
            yield Problem("quantize.linear.float8.filter_fqns", message, 'Add "output" to it')

    def _token_problems(self, context: PlanContext) -> Iterator[Problem]:
        """A weight's gradient is a product over a microbatch's tokens, so their number matters too."""
        shape, size = context.mesh_shape, self.training.local_batch_size
        if shape.pp > 1:
            size = self.parallelism.pipeline_parallel_microbatch_size
        num_tokens = size * context.seq_len // shape.cp
        if num_tokens % MULTIPLE and self.recipe_name != "rowwise_with_gw_hp":
            ranks = " on each context-parallel rank" if shape.cp > 1 else ""
            message = (
                f"Float8 needs microbatches of a multiple of {MULTIPLE} tokens{ranks}, and {size} x "
                f"{context.seq_len} makes {num_tokens}"
            )
            yield Problem("training.seq_len", message, f"A multiple of {MULTIPLE * shape.cp} fits any batch")

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        names = [every for name, *_ in linear_sizes(context) for every in _in_all_layers(name, context)]
        leaves = sorted({leaf for name in names for leaf in name.split(".") if not leaf.isdigit()})
        for pattern in self.section.filter_fqns:
            if not any(pattern in name for name in names):
                message = f'"{pattern}" matches no linear layer'
                yield Problem("quantize.linear.float8.filter_fqns", message, suggestion(pattern, leaves))

    def _keeps(self, name: str, context: PlanContext) -> bool:
        """Whether a layer is not converted. A tied head is not: its weight is also the embedding's lookup table."""
        tied = context.model_config.tie_word_embeddings and name == "output"
        return tied or any(pattern in name for pattern in self.section.filter_fqns)

    def _emulates(self, context: PlanContext) -> bool:
        """Whether Float8 products are emulated. A plan made without GPUs assumes that they have them."""
        if self.section.emulate or context.device_type == "cpu":
            return True
        return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        _import_torchao()
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(self.recipe_name)
        config = replace(
            config,
            emulate=self._emulates(context),
            enable_fsdp_float8_all_gather=self.section.enable_fsdp_float8_all_gather,
        )
        for part in parts:
            convert_to_float8_training(
                part, config=config, module_filter_fn=lambda _module, name: not self._keeps(name, context)
            )
            if self.model.print_after_conversion:
                logger.info("%s", part)
        return parts

    def after_optimizer_step(self, parts: ModelParts, context: BuildContext) -> None:
        if self.section.precompute_float8_dynamic_scale_for_fsdp:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            for part in parts:
                precompute_float8_dynamic_scale_for_fsdp(part)

    def weights_replaced(self, parts: ModelParts, context: BuildContext) -> None:
        self.after_optimizer_step(parts, context)

    def describe(self, context: PlanContext) -> str:
        gather = ", gathered in Float8" if self.section.enable_fsdp_float8_all_gather else ""
        scales = ", scales precomputed" if self.section.precompute_float8_dynamic_scale_for_fsdp else ""
        how = ", emulated" if self._emulates(context) else ""
        kept = f", without {', '.join(self.section.filter_fqns)}" if self.section.filter_fqns else ""
        return f"float8: {self.recipe_name}{how}{gather}{scales}{kept}"


def _in_all_layers(name: str, context: PlanContext) -> list[str]:
    """A first-layer name, repeated for every layer; other names unchanged."""
    if not name.startswith("layers.0."):
        return [name]
    return [f"layers.{layer}.{name.removeprefix('layers.0.')}" for layer in range(context.model_config.num_layers)]


def _import_torchao() -> None:
    """Imports torchao without its warnings about other GPUs' kernels and its own deprecations."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torchao(\.|$)")
        import torchao.float8  # noqa: F401


def linear_sizes(context: PlanContext) -> Iterator[tuple[str, int, int]]:
    """(name, output channels, input channels) of every linear layer on one tensor-parallel rank.

    Channels that do not divide evenly over the ranks count as 1, which no Float8 product accepts.
    """
    degree = context.mesh_shape.tp
    config = replace(context.model_config, num_layers=1)  # all layers are alike
    with torch.device("meta"):
        model: Any = context.family.Decoder(config, context.seq_len)
    plan = context.family.tensor_parallel_plan(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            num_out, num_in = module.out_features, module.in_features
            if plan.get(name) in (Split.COLUMNS, Split.HEAD):
                num_out = num_out // degree if num_out % degree == 0 else 1
            elif plan.get(name) is Split.ROWS:
                num_in = num_in // degree if num_in % degree == 0 else 1
            yield name, num_out, num_in
