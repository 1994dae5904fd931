"""Forward and backward over model parts on several ranks, run by PyTorch's pipeline schedules.

The last part returns a microbatch's sum of losses, divided here by the global batch's number of valid tokens: gradients
are those of an unsplit model, whatever the schedule (`scale_grads` is off).

PyTorch gets the shapes between parts (static metadata), so it does not have to infer or send them. Evaluation has its
own `PipelineStage` and schedule objects around the same modules: some schedules cannot skip their backward passes, and
validation may have other shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from titan_growth.engine.build import BuiltModel
from titan_growth.engine.engine import Engine, Microbatch
from titan_growth.layout.pipeline_layout import PipelineLayout
from titan_growth.stages.pipeline import Pipeline, layout_of
from titan_growth.tools.torch_private import drop_activations, forward_schedule_of, schedule_of, stand_in_for_peers

logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.ERROR)  # it logs its class at each build


class PipelineEngine(Engine):
    """Runs this rank's parts together with those of the other pipeline ranks."""

    def __init__(self, model: BuiltModel, stage: Pipeline, device: torch.device) -> None:
        super().__init__(model, device)
        self.layout: PipelineLayout = layout_of(stage, model.context)
        self.microbatch_size = stage.parallelism.pipeline_parallel_microbatch_size
        self.compute_dtype = getattr(torch, stage.training.mixed_precision_param)
        self.group = model.context.mesh.group_of("pp")
        self.parts = self.layout.parts_of(model.context.mesh.rank_of("pp"))
        self.holds_first = any(part.first for part in self.parts)
        self.holds_last = any(part.last for part in self.parts)
        self.divisor = 1.0
        # Mixed sends and receives use a communicator of the whole group. NCCL creates it at first use, which all ranks
        # must join: here, not in a schedule where only two ranks communicate.
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self._training: tuple[tuple[int, ...], Any] | None = None
        self._evaluations: dict[tuple[int, ...], Any] = {}

    # ---- passes --------------------------------------------------------------------------------------------------

    def evaluate(self, microbatches: Iterable[Microbatch]) -> float:
        loss = super().evaluate(microbatches)
        self._evaluations.clear()  # with their receive buffers
        return loss

    def _train(self, batch: Microbatch, num_tokens: int) -> Tensor:
        self.divisor = float(num_tokens)
        shape = tuple(batch["input"].shape)
        if self._training is None or self._training[0] != shape:
            self._training = shape, self._training_schedule(shape)
        with self.model.train_context():
            return self._run(self._training[1].step, batch)

    def _evaluate(self, batch: Microbatch) -> Tensor:
        self.divisor = 1.0
        shape = tuple(batch["input"].shape)
        if shape not in self._evaluations:
            self._evaluations[shape] = self._evaluation_schedule(shape)
        schedule = self._evaluations[shape]
        with self.model.train_context():
            loss_sum = self._run(schedule.eval, batch)
        drop_activations(schedule)
        return loss_sum

    def _run(self, step: Callable[..., Any], batch: Microbatch) -> Tensor:
        """One pass over a batch; the sum of its losses on the rank with the last part, 0 elsewhere."""
        tokens = (batch["input"],) if self.holds_first else ()
        kwargs: dict[str, Any] = {}
        if "positions" in batch:
            kwargs["positions_BT"] = batch["positions"]
        losses: list[Tensor] = []
        if self.holds_last:
            kwargs |= {"labels_BS": batch["labels"], "target": batch["labels"], "losses": losses}
        step(*tokens, **kwargs)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=self.device)

    def _divided(self, loss_sum: Tensor, _target: Tensor) -> Tensor:
        return loss_sum.sum() / self.divisor

    # ---- schedules -----------------------------------------------------------------------------------------------

    def _training_schedule(self, shape: tuple[int, ...]) -> Any:
        num_microbatches = self.layout.num_microbatches
        assert shape[0] == num_microbatches * self.microbatch_size, f"a batch of {shape[0]} sequences was not planned"
        pipeline_stages = self._pipeline_stages(self.microbatch_size, shape[1])
        options: dict[str, Any] = {"loss_fn": self._divided, "scale_grads": False}
        if self.layout.order:  # read from a file
            return schedule_of(pipeline_stages, num_microbatches, self.layout.order, **options)
        kind = get_schedule_class(self.layout.schedule)
        single = self.layout.conditions.single
        return kind(pipeline_stages[0] if single else pipeline_stages, num_microbatches, **options)

    def _evaluation_schedule(self, shape: tuple[int, ...]) -> Any:
        """Forward passes only: all microbatches through one part, then through the rank's next."""
        size = self.microbatch_size if shape[0] % self.microbatch_size == 0 else 1
        num_microbatches = shape[0] // size
        microbatches = range(num_microbatches)
        order = [
            [(part.index, "F", microbatch) for part in self.layout.parts_of(rank) for microbatch in microbatches]
            for rank in range(self.model.context.mesh_shape.pp)
        ]
        pipeline_stages = self._pipeline_stages(size, shape[1])
        return forward_schedule_of(
            pipeline_stages, num_microbatches, order, self.layout.rank_of_part, loss_fn=self._divided
        )

    def _pipeline_stages(self, num_sequences: int, num_tokens: int) -> list[PipelineStage]:
        """PyTorch's objects around this rank's parts, for microbatches of (num_sequences, num_tokens)."""
        num_hidden = num_tokens // self.model.context.mesh_shape.tp  # sequence parallel: one shard per rank
        with torch.device("meta"):
            tokens = torch.empty(num_sequences, num_tokens, dtype=torch.int64)
            size = (num_sequences, num_hidden, self.model.context.model_config.dim)
            hidden = torch.empty(size, dtype=self.compute_dtype, requires_grad=True)
            loss = torch.empty(1, dtype=torch.float32, requires_grad=True)
        pipeline_stages = [
            PipelineStage(
                module,
                part.index,
                len(self.layout.parts),
                self.device,
                input_args=tokens if part.first else hidden,
                output_args=loss if part.last else hidden,
                group=self.group,
            )
            for part, module in zip(self.parts, self.model.parts, strict=True)
        ]
        if dist.get_backend(self.group) == "fake":
            for pipeline_stage in pipeline_stages:
                stand_in_for_peers(pipeline_stage)
        return pipeline_stages


def make_engine(model: BuiltModel, device: torch.device) -> Engine:
    """The pipeline engine for a pipelined model, the plain one otherwise."""
    for stage in model.stages:
        if isinstance(stage, Pipeline):
            return PipelineEngine(model, stage, device)
    return Engine(model, device)
