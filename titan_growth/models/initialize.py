"""Initial weights that do not depend on the layout.

A parameter is drawn in blocks of rows, each from its own generator, seeded by (seed, parameter name, block). Names
carry the global layer id, so a rank draws only the blocks that its shard overlaps, and every mesh, on CPU or GPU,
starts from the same bits. Numbers are drawn on the CPU: generators differ between devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_growth.models.initial_values import InitialValues
from titan_growth.tools.torch_private import compute_local_shape_and_global_offset

ROWS_PER_BLOCK = 256


@torch.no_grad()
def init_weights(
    parts: Iterable[nn.Module],
    values_of: Callable[[str], InitialValues | None],
    seed: int,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Fills every parameter of materialised (not meta) parts in place.

    Args:
        parts: the model parts of this rank, plain or sharded.
        values_of: distribution by parameter name; None means ones.
        seed: the run's; the same on every rank.
        tied: copies of parameters -> the name of the original; both get the same values.
    """
    for part in parts:
        for name, parameter in part.named_parameters():
            name = (tied or {}).get(name, name)
            local, offset = local_and_offset(parameter)
            draw(local, offset, parameter.shape, name, values_of(name), seed)


def local_and_offset(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's box of a tensor, and its offset in the whole tensor."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)


def draw(
    local: Tensor, offset: tuple[int, ...], shape: torch.Size, name: str, initial: InitialValues | None, seed: int
) -> None:
    """Fills a box of a parameter with its initial values, which do not depend on how the parameter is sharded.

    Args:
        local: the box, one- or two-dimensional.
        offset: of the box in the parameter.
        shape: of the whole parameter.
        initial: distribution of the values; None means ones.
    """
    if initial is None:
        local.fill_(1.0)
        return
    if not local.numel():
        return
    first_row, first_column = offset
    num_rows, num_columns = local.shape
    for block in range(first_row // ROWS_PER_BLOCK, (first_row + num_rows - 1) // ROWS_PER_BLOCK + 1):
        block_start = block * ROWS_PER_BLOCK
        values = torch.empty(min(ROWS_PER_BLOCK, shape[0] - block_start), shape[1])
        generator = torch.Generator().manual_seed(_block_seed(seed, name, block))
        limit = initial.limit
        if initial.uniform:
            nn.init.uniform_(values, -limit, limit, generator=generator)
        else:
            nn.init.trunc_normal_(values, std=initial.std, a=-limit, b=limit, generator=generator)
        start = max(block_start, first_row)
        stop = min(block_start + values.shape[0], first_row + num_rows)
        rows = values[start - block_start : stop - block_start, first_column : first_column + num_columns]
        local[start - first_row : stop - first_row].copy_(rows)


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
