"""Forward and backward over model parts on several ranks, run by PyTorch's pipeline schedules.

The last part returns the sum of losses of a microbatch, divided here by the number of valid tokens of the whole global
batch: gradients are those of an unsplit model, whatever the schedule (`scale_grads` is off).

Shapes between parts are told to PyTorch (static metadata), so nothing is run or sent to find them out. Evaluation has
stage and schedule objects of its own around the same modules: some schedules cannot leave out their backward passes,
and validation may have other shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from titan_growth.engine.build import BuiltModel
from titan_growth.engine.engine import Engine, Microbatch
from titan_growth.layout.pipeline_layout import PipelineLayout
from titan_growth.stages.pipeline import Pipeline

logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.ERROR)  # it names the class at each build


class PipelineEngine(Engine):
    """Runs the parts of this rank together with those of the other pipeline ranks."""

    def __init__(self, model: BuiltModel, stage: Pipeline, device: torch.device) -> None:
        super().__init__(model, device)
        self.layout: PipelineLayout = stage.layout(model.context)
        self.microbatch_size = stage.parallelism.pipeline_parallel_microbatch_size
        self.compute_dtype = getattr(torch, stage.compute_dtype)
        assert model.context.mesh is not None, "a pipeline needs process groups"
        self.group = model.context.mesh.group_of("pp")
        self.parts = self.layout.parts_of(model.context.mesh.rank_of("pp"))
        self.holds_first = any(part.first for part in self.parts)
        self.holds_last = any(part.last for part in self.parts)
        self.divisor = 1.0
        # Mixed sends and receives go through a communicator of the whole group. NCCL makes it at its first use, in
        # which all ranks must take part: here, not in a schedule that has only two of them talking.
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self._training: tuple[tuple[int, ...], Any] | None = None
        self._evaluations: dict[tuple[int, ...], Any] = {}

    # ---- passes --------------------------------------------------------------------------------------------------

    def _accumulate(self, microbatches: Sequence[Microbatch], num_tokens: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        self.divisor = float(num_tokens)
        for microbatch in microbatches:
            batch = self.on_device(microbatch)
            shape = tuple(batch["input"].shape)
            if self._training is None or self._training[0] != shape:
                self._training = shape, self._training_schedule(shape)
            with self.model.train_context():
                total += self._run(self._training[1].step, batch)
        return total

    def _loss_sums(self, microbatches: Iterable[Microbatch]) -> Iterable[Tensor]:
        self.divisor = 1.0
        for microbatch in microbatches:
            batch = self.on_device(microbatch)
            shape = tuple(batch["input"].shape)
            if shape not in self._evaluations:
                self._evaluations[shape] = self._evaluation_schedule(shape)
            schedule = self._evaluations[shape]
            with self.model.train_context():
                loss_sum = self._run(schedule.eval, batch)
            for stage in schedule._stages:
                stage.clear_runtime_states()  # it would keep the activations of all microbatches until its next pass
            yield loss_sum
        self._evaluations.clear()  # with their receive buffers

    def _run(self, step: Callable[..., Any], batch: Microbatch) -> Tensor:
        """One pass over a batch; the sum of its losses on the rank with the last part, elsewhere 0."""
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
        stages = self._stages(self.microbatch_size, shape[1])
        options = {"loss_fn": self._divided, "scale_grads": False}
        if self.layout.order:  # read from a file
            schedule = torch_schedules._PipelineScheduleRuntime(stages, num_microbatches, **options)
            kind_of = torch_schedules._ComputationType
            schedule._prepare_schedule_with_comms(
                {
                    rank: [torch_schedules._Action(a.part, kind_of(a.kind), a.microbatch) for a in actions]
                    for rank, actions in enumerate(self.layout.order)
                }
            )
            return schedule
        kind = torch_schedules.get_schedule_class(self.layout.schedule)
        return kind(stages[0] if self.layout.is_single else stages, num_microbatches, **options)

    def _evaluation_schedule(self, shape: tuple[int, ...]) -> Any:
        """Forward passes alone, all microbatches through one part and then through the rank's next."""
        size = self.microbatch_size if shape[0] % self.microbatch_size == 0 else 1
        num_microbatches = shape[0] // size
        stages = self._stages(size, shape[1])
        schedule = torch_schedules._PipelineScheduleRuntime(stages, num_microbatches, loss_fn=self._divided)
        placement = dict(enumerate(self.layout.rank_of_part))
        schedule.stage_index_to_group_rank = placement
        for stage in stages:
            stage.stage_index_to_group_rank = placement
        forward = torch_schedules._ComputationType.FORWARD
        actions = {
            rank: torch_schedules._add_unshard_reshard(
                [
                    torch_schedules._Action(part.index, forward, microbatch)
                    for part in self.layout.parts_of(rank)
                    for microbatch in range(num_microbatches)
                ]
            )
            for rank in range(self.model.context.mesh_shape.pp)
        }
        schedule.pipeline_order_with_comms = torch_schedules._add_send_recv(
            actions, stage_to_rank=lambda part: placement[part], num_stages=len(self.layout.parts)
        )
        return schedule

    def _stages(self, num_sequences: int, num_tokens: int) -> list[PipelineStage]:
        """PyTorch's objects around this rank's parts, for microbatches of (num_sequences, num_tokens)."""
        num_hidden = num_tokens // self.model.context.mesh_shape.tp  # sequence parallel: a piece for each rank
        with torch.device("meta"):
            tokens = torch.empty(num_sequences, num_tokens, dtype=torch.int64)
            size = (num_sequences, num_hidden, self.model.config.dim)
            hidden = torch.empty(size, dtype=self.compute_dtype, requires_grad=True)
            loss = torch.empty(1, dtype=torch.float32, requires_grad=True)
        kind = _DryPart if dist.get_backend(self.group) == "fake" else PipelineStage
        return [
            kind(
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


class _DryPart(PipelineStage):
    """A part in a dry run, where nobody answers: all parts have static metadata, so the vote on that is known."""

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)
