"""PyTorch's private and experimental names: all that this package uses, with a reason for each.

They may change in any PyTorch release, so they are used here and nowhere else (tests/unit/tools/test_torch_private.py):
an upgrade starts with this file. What loads the compiler is imported inside functions: it takes half a second that most
commands do not need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_gather_single_autograd, wait_tensor
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo  # where a chunk is stored, in .metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store as default_store  # messages beside the collectives
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method
from torch.testing._internal.distributed.fake_pg import FakeStore  # of the `fake` backend, for dry runs
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

__all__ = [
    "FakeStore",
    "StorageInfo",
    "all_gather_single_autograd",  # dist.all_gather has no backward pass
    "compute_local_shape_and_global_offset",  # publicly a DTensor gives its shard, but not where that begins
    "default_store",
    "is_traceable_wrapper_subclass",  # the wrappers of torchao have no public API
    "wait_tensor",
]

# fully_shard takes one sharded axis, and there is no public way to make one of two.
flattened = DeviceMesh._flatten
# Slicing by name cannot put flattened axes beside others.
concatenated = DeviceMesh._concatenate
# The norms of many tensors in one kernel, in a dtype of choice; torch.nn.utils.get_total_norm cannot choose it.
foreach_norm = torch._foreach_norm
# The step of a moving average over many tensors in one kernel.
foreach_lerp = torch._foreach_lerp_
# PyTorch documents these two under their private names.
record_memory_history = torch.cuda.memory._record_memory_history
dump_memory_snapshot = torch.cuda.memory._dump_snapshot
# Whether the CPU has matrix units for bfloat16 (Intel's AMX).
has_amx = torch.cpu._is_amx_tile_supported


# ---- process groups --------------------------------------------------------------------------------------------------


def process_groups() -> list[ProcessGroup]:
    """Every process group of this process; there is no public way to list them."""
    return list(dist.distributed_c10d._world.pg_map)


def set_group_timeout(group: ProcessGroup, seconds: float, nccl_seconds: float) -> None:
    """Changes a group's timeout; publicly it is fixed when the group is created."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    if "nccl" in dist.get_backend_config(group):
        backend: Any = group._get_backend(torch.device("cuda"))
        backend._set_default_timeout(timedelta(seconds=nccl_seconds))


# ---- attention -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ring_attention(mesh: DeviceMesh, *, rotate_method: str, balanced: bool, device_type: str) -> Iterator[None]:
    """Makes scaled-dot-product attention pass keys and values around `mesh`; experimental throughout."""
    set_rotate_method(rotate_method)
    _cp_options.enable_load_balance = balanced
    # It shards the buffers it is given, and needs at least one; batches are sharded already.
    buffer = torch.zeros(2 * mesh.size(), device=device_type)
    with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer}):
        yield


def expensive_operations() -> set[Any]:
    """What costs more to recompute than to keep: attention, scaled products, and reductions over ranks.

    These are the dispatcher's names, which `F.scaled_dot_product_attention` and the collectives resolve to.
    """
    aten, collectives = torch.ops.aten, torch.ops._c10d_functional
    return {
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_mm.default,
        aten.max.default,  # the scale of a Float8 tensor
        collectives.reduce_scatter_tensor.default,
    }


# ---- compiler --------------------------------------------------------------------------------------------------------


def overlap_tensor_parallel(group: ProcessGroup) -> None:
    """Lets the compiler overlap collectives with matrix products ("async tensor parallel"); experimental."""
    import torch._inductor.config

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)


def set_memory_budget(budget: float | None, pareto_folder: str | None = None) -> None:
    """The fraction of activations that compiled code keeps, None for all; documented, but without a public API.

    Args:
        pareto_folder: where the compiler plots what other budgets would cost.
    """
    config = torch._functorch.config
    # Objects without a size are process groups, which hold no tensors.
    config.unsafe_treat_script_objects_as_zero_size = budget is not None
    config.activation_memory_budget = 1.0 if budget is None else budget
    if pareto_folder is not None:
        config.visualize_memory_budget_pareto = True
        config.memory_budget_pareto_dir = pareto_folder


def compile_with_hooks() -> None:
    """Makes compiled code shared by several modules depend on their hooks, which by default it does not.

    Then there is a version of a block for every state of its hooks, and with several shapes (validation, a growth in
    width) more than the 8 that the compiler makes before it gives up.
    """
    import torch._dynamo.config

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


# ---- pipelines -------------------------------------------------------------------------------------------------------

Order = Sequence[Sequence[tuple[int, str, int]]]
"""For each pipeline rank, its (part, "F" | "B" | "I" | "W", microbatch) in order."""


def schedule_of(pipeline_stages: list[PipelineStage], num_microbatches: int, order: Order, **options: Any) -> Any:
    """A schedule of these actions. Publicly PyTorch takes them from a file only."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    schedule = _PipelineScheduleRuntime(pipeline_stages, num_microbatches, **options)
    schedule._prepare_schedule_with_comms(_actions(order))
    return schedule


def forward_schedule_of(
    pipeline_stages: list[PipelineStage],
    num_microbatches: int,
    order: Order,
    rank_of_part: Sequence[int],
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """A schedule of forward passes only: some of PyTorch's schedules cannot skip their backward passes."""
    from torch.distributed.pipelining import schedules

    schedule = schedules._PipelineScheduleRuntime(pipeline_stages, num_microbatches, loss_fn=loss_fn)
    placement = dict(enumerate(rank_of_part))
    schedule.stage_index_to_group_rank = placement
    for pipeline_stage in pipeline_stages:
        pipeline_stage.stage_index_to_group_rank = placement
    gathered = {rank: schedules._add_unshard_reshard(row) for rank, row in _actions(order).items()}
    actions = schedules._add_send_recv(gathered, stage_to_rank=lambda part: placement[part], num_stages=len(placement))
    if hasattr(schedules, "_add_wait_send"):  # PyTorch 2.15 waits for sends by actions, 2.13 by itself
        actions = schedules._add_wait_send(actions)
    schedule.pipeline_order_with_comms = actions
    return schedule


def _actions(order: Order) -> dict[int, list[Any]]:
    from torch.distributed.pipelining.schedules import _Action, _ComputationType

    return {
        rank: [_Action(part, _ComputationType(kind), microbatch) for part, kind, microbatch in row]
        for rank, row in enumerate(order)
    }


def drop_activations(schedule: Any) -> None:
    """Frees all microbatches' activations, which a schedule would otherwise keep until its next pass."""
    for pipeline_stage in schedule._stages:
        pipeline_stage.clear_runtime_states()


def stand_in_for_peers(pipeline_stage: PipelineStage) -> None:
    """For a dry run, without other ranks: their votes (of torch 2.13) are known, and what they send is zeros."""
    for vote in ("_warmup_forward_vote", "_warmup_backward_result"):
        setattr(pipeline_stage, vote, lambda *_args, **_kwargs: torch.ones(1, dtype=torch.int32))
    for name in ("get_fwd_recv_ops", "get_bwd_recv_ops"):
        setattr(pipeline_stage, name, partial(_zeroed, getattr(pipeline_stage, name)))


def _zeroed(receives_of: Callable[[int], list[dist.P2POp]], microbatch: int) -> list[dist.P2POp]:
    """The receives of a microbatch; the fake backend leaves their memory as it is."""
    receives = receives_of(microbatch)
    for receive in receives:
        receive.tensor.detach().zero_()
    return receives
