"""The `[parallelism]` table: how the ranks are divided, with torchtitan 0.2.2's keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from titan_growth.config.section import BadValueError, Section


class ParallelismConfig(Section):
    """How the ranks are divided."""

    data_parallel_replicate_degree: int = Field(1, ge=1)
    """Replicas of the model (HSDP together with sharding; DDP when the shard degree is 1)."""
    data_parallel_shard_degree: int = Field(-1, ge=-1)
    """Ranks that share one copy of parameters, gradients and moments (FSDP2); -1 = all that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free the gathered parameters after the forward pass (default: never with pipeline parallelism, else always)."""
    tensor_parallel_degree: int = Field(1, ge=1)
    """Ranks that split each matrix product; the residual stream is split over the sequence between them."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss instead of computing the loss on the split vocabulary."""
    enable_async_tensor_parallel: bool = False
    """Overlap the collectives of tensor parallelism with its products. CUDA only, needs compile.enable."""
    pipeline_parallel_degree: int = Field(1, ge=1)
    """Ranks that hold different layers."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """Modules of each part: [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]. Default: split evenly."""
    pipeline_parallel_first_stage_less_layers: int = Field(1, ge=0)
    """Layers that the first part has less than an even share, because it holds the embedding too."""
    pipeline_parallel_last_stage_less_layers: int = Field(1, ge=0)
    """Layers that the last part has less than an even share, because it holds the head too."""
    pipeline_parallel_layers_per_stage: int | None = Field(None, ge=1)
    """Layers of a part; sets the number of parts. Default: one part a rank, or two if the schedule needs them."""
    pipeline_parallel_schedule: str = "1F1B"
    """Schedule of torch.distributed.pipelining: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble,
    ZBVZeroBubble or DualPipeV."""
    pipeline_parallel_schedule_csv: str = ""
    """A file with a schedule of your own, one line of actions a rank (PyTorch's compute-only format)."""
    pipeline_parallel_microbatch_size: int = Field(1, ge=1)
    """Sequences of a pipeline microbatch; must divide training.local_batch_size."""
    context_parallel_degree: int = Field(1, ge=1)
    """Ranks that split each sequence."""
    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """headtail gives each rank a piece from both ends of the sequence, for equal work in attention."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How ring attention passes keys and values on (CUDA; on a CPU they are always gathered)."""

    @field_validator("context_parallel_load_balancer", mode="before")
    @classmethod
    def _no_balancer(cls, value: Any) -> Any:
        """torchtitan says None, which TOML cannot."""
        if value == "ptrr":
            raise BadValueError(
                "'ptrr' needs FlexAttention, which this version does not have", "Use 'headtail' or 'none'"
            )
        return "none" if value in (None, "None") else value
