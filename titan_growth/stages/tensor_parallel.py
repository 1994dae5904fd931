"""Tensor parallelism with sequence parallelism: matrix products are sharded over the `tp` axis.

The model family declares how each module is split (`tensor_parallel_plan`, see `models.decoder.Split`); this stage
maps that to PyTorch's parallel styles. Between products the residual stream is sharded over the sequence, so norms,
residuals and activations cost each rank only its share.

With loss parallel (the default) the logits stay sharded over the vocabulary and the loss is computed on the shards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from titan_growth.config.schema.recipe import ParallelismConfig, TrainingConfig, ValidationConfig
from titan_growth.models.decoder import Decoder, Split
from titan_growth.stages.base import BuildContext, ModelParts, PlanContext, Stage
from titan_growth.stages.order import register_stage
from titan_growth.tools.errors import Problem
from titan_growth.tools.torch_private import overlap_tensor_parallel


@register_stage
@dataclass
class TensorParallel(Stage):
    """DTensor tensor and sequence parallelism, with loss parallel."""

    name: ClassVar[str] = "tensor_parallel"
    after: ClassVar[tuple[str, ...]] = ("pipeline", "float8")  # it must see the Float8 layers

    parallelism: ParallelismConfig
    validation: ValidationConfig
    training: TrainingConfig

    def enabled(self, context: PlanContext) -> bool:
        return context.mesh_shape.tp > 1

    @property
    def loss_parallel(self) -> bool:
        """Whether the loss is computed on logits sharded over the vocabulary."""
        return not self.parallelism.disable_loss_parallel and not self.training.loss_chunk_tokens

    def check(self, context: PlanContext) -> Iterator[Problem]:
        config, degree = context.model_config, context.mesh_shape.tp
        key = "parallelism.tensor_parallel_degree"
        sizes = (
            ("query heads (model.n_heads)", config.num_heads),
            ("key/value heads (model.n_kv_heads)", config.num_kv_heads),
            ("channels of the SwiGLU hidden layer (model.hidden_dim)", config.hidden_dim),
        )
        if uneven := [f"{size} {what}" for what, size in sizes if size % degree]:
            most = math.gcd(*(size for _, size in sizes))
            hint = f"A divisor of {most} would fit" if most > 1 else ""
            yield Problem(key, f"{degree} does not divide the model's {', '.join(uneven)}", hint)
        if config.vocab_size < degree:
            yield Problem(key, f"{degree} is more than the vocabulary's {config.vocab_size} entries")
        yield from sequence_problems(context, self.validation)
        if self.parallelism.enable_async_tensor_parallel and context.device_type != "cuda":
            message = "needs CUDA (symmetric memory between GPUs), and this run is on the CPU"
            yield Problem("parallelism.enable_async_tensor_parallel", message, "Set it to false")

    def warnings(self, context: PlanContext) -> Iterator[Problem]:
        if self.training.loss_chunk_tokens and self.parallelism.disable_loss_parallel:
            message = "has no effect: with training.loss_chunk_tokens the vocabulary is always split"
            yield Problem("parallelism.disable_loss_parallel", message)

    def apply(self, parts: ModelParts, context: BuildContext) -> ModelParts:
        mesh = context.mesh.device_mesh["tp"]
        for part in parts:
            plan = context.family.tensor_parallel_plan(part)
            styles = {name: self._style(part, name, split, plan, context) for name, split in plan.items()}
            parallelize_module(part, mesh, styles)
            if part.tok_embeddings is not None:
                part.tok_embeddings.register_forward_hook(_owned)
            part.tie_weights()  # parallelize_module gave each module its own parameter
            part.sequence.hidden_shards = context.mesh_shape.tp
        if self.parallelism.enable_async_tensor_parallel:
            overlap_tensor_parallel(mesh.get_group())
        return parts

    def _style(
        self, part: Decoder, name: str, split: Split, plan: dict[str, Split], context: BuildContext
    ) -> ParallelStyle:
        columns, rows, gather = ColwiseParallel, RowwiseParallel, PrepareModuleInput
        extra: dict[str, Any] = {}
        # gloo cannot send Float8 tensors, so on a CPU the casts come after the collectives.
        if context.device_type == "cuda" and (casts := _float8_linears(part, name, split, plan)):
            from torchao.float8.float8_tensor_parallel import (
                Float8ColwiseParallel,
                Float8RowwiseParallel,
                PrepareFloat8ModuleInput,
            )

            columns, rows, gather = Float8ColwiseParallel, Float8RowwiseParallel, PrepareFloat8ModuleInput
            extra = {"fwd_config_submodule_fqn": casts[0]} if split is Split.GATHER_INPUT else {}
        match split:
            case Split.VOCABULARY:
                return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
            case Split.SEQUENCE:
                return SequenceParallel()
            case Split.HEADS:
                return SequenceParallel(sequence_dim=2, use_local_output=True)
            case Split.GATHER_INPUT:
                return gather(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), **extra)
            case Split.COLUMNS:
                return columns()
            case Split.ROWS:
                return rows(output_layouts=Shard(1))
            case Split.HEAD:
                layout = Shard(-1) if self.loss_parallel else Replicate()
                return ColwiseParallel(
                    input_layouts=Shard(1), output_layouts=layout, use_local_output=not self.loss_parallel
                )
        raise AssertionError(f"no style for {split}")

    def train_context(self, context: BuildContext) -> contextlib.AbstractContextManager[Any]:
        return loss_parallel() if self.loss_parallel else contextlib.nullcontext()

    def describe(self, context: PlanContext) -> str:
        gathers = self.parallelism.disable_loss_parallel and not self.training.loss_chunk_tokens
        loss = "logits gathered" if gathers else "loss on the split vocabulary"
        overlap = ", collectives overlapped with products" if self.parallelism.enable_async_tensor_parallel else ""
        return f"tensor_parallel: {context.mesh_shape.tp} ranks, sequence parallel, {loss}{overlap}"


def _owned(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """The embedding's output as a tensor that owns its memory.

    DTensor returns a view of a collective's result. Compiled blocks lose the gradient of such an input (torch 2.13: the
    embedding was not trained at all), and FSDP warns about it.
    """
    return output.clone()


def sequence_problems(context: PlanContext, validation: ValidationConfig) -> Iterator[Problem]:
    """Sequence lengths that do not divide evenly over the tensor- and context-parallel ranks."""
    shape = context.mesh_shape
    pieces = shape.tp * (2 * shape.cp if shape.cp > 1 else 1)
    product = f"tensor-parallel degree {shape.tp}" if shape.tp > 1 else ""
    if shape.cp > 1:
        product += f"{' x ' if product else ''}2 x context-parallel degree {shape.cp}"
    validation_seq_len = validation.seq_len if validation.enable else None
    for key, length in (("training.seq_len", context.seq_len), ("validation.seq_len", validation_seq_len)):
        if length is not None and length % pieces:
            below = length // pieces * pieces
            fitting = f"{below} or {below + pieces}" if below else str(pieces)
            message = f"{length} is not a multiple of {product} = {pieces}"
            yield Problem(key, message, f"{fitting} would fit")


def _float8_linears(part: Decoder, name: str, split: Split, plan: dict[str, Split]) -> list[str]:
    """Names of the Float8 tensorwise layers: the module itself, or those that read its gathered input.

    Empty unless all of them are Float8: an input cannot be gathered in Float8 for only some of its readers.
    """
    if split in (Split.COLUMNS, Split.ROWS):
        names = [name]
    elif split is Split.GATHER_INPUT:
        names = [other for other, how in plan.items() if how is Split.COLUMNS and other.startswith(name + ".")]
    else:
        return []
    for other in names:
        module = part.get_submodule(other)
        config = getattr(module, "config", None)
        granularity = getattr(getattr(config, "cast_config_input", None), "scaling_granularity", None)
        if type(module).__name__ != "Float8Linear" or getattr(granularity, "value", "") != "tensorwise":
            return []
    return [other.removeprefix(name + ".") for other in names]
