"""Cross-entropy of the output projection, without ever holding all logits.

A microbatch's logits are its largest tensor by far: 8,192 positions over a 128,256-word vocabulary take 4.2 GB in
float32, and plain cross-entropy keeps several such tensors (logits, log-probabilities, their gradients). Yet a
position's loss depends only on its own logits, and so does its gradient,

    d loss / d logits = softmax(logits) - one_hot(label).

So the backward pass needs none of them: for a few hundred positions at a time, one buffer takes the logits, the
probabilities and the gradient in turn, and the gradient is multiplied at once with the weight and the hidden states.
What outlives the forward pass has the size of the hidden states and the weight; the backward pass only scales it by the
incoming gradient (so activation checkpointing around it is pointless). The work is that of the plain loss, three matrix
products, in a different order.

With the vocabulary's rows sharded over a group, each rank computes the logits of its own rows. Per position it
contributes three numbers (the largest logit, the sum of exponentials relative to it, and the label's logit if the label
is one of its rows), gathered in one collective per chunk. From these every rank derives the same loss, and the gradient
of its own logits.

Shape suffixes: N positions, C positions of a chunk, D model width, V rows of the vocabulary on this rank, R ranks of
the group, 3 the numbers above.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_growth.models.z_loss import ZLoss, gathered
from titan_growth.tools.labels import IGNORE_INDEX

SLICE_ROWS = 4096
"""Rows of a gradient converted between dtypes at a time, to avoid a second full copy."""


def chunked_cross_entropy_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    vocab_offset: int = 0,
    softcap: float | None = None,
    z_loss: ZLoss | None = None,
) -> Tensor:
    """Sum over positions with a label of -log softmax(hidden @ weight^T)[label], in nats.

    Gradients are computed here, in the forward pass, and only those required: none under `torch.no_grad()`. Matrix
    products run in the inputs' dtype, or autocast's if enabled; softmax, loss and the weight gradient's sum over chunks
    are float32 (float64 for float64 inputs). Each chunk reads and writes that whole sum once: prefer long chunks.

    Args:
        hidden_ND: hidden states after the last norm, a plain tensor, not a DTensor.
        weight_VD: the output projection; with `group`, this rank's rows of it. Shards may differ in length or be empty.
        labels_N: int64 indices into the whole vocabulary. -100 contributes neither loss nor gradient. Any other label
            that no rank has a row for makes the loss inf and the gradients NaN: checking it would cost a device
            synchronisation, and ignoring it would silently corrupt the model.
        chunk_tokens: positions whose logits exist at the same time. The last chunk may be shorter.
        group: the ranks that the vocabulary is sharded over. All of them call this together, with the same hidden
            states, labels and `chunk_tokens`.
        vocab_offset: index in the whole vocabulary of this rank's first row.
        softcap: logits are softcap * tanh(hidden @ weight^T / softcap), if given. Takes one more buffer.
        z_loss: its gradient is added to that of the loss, whose value stays the cross-entropy.

    Returns:
        A scalar, float32 (float64 for float64 inputs): the loss over the whole vocabulary, the same on every rank of
        the group. Its gradient for `hidden_ND` is **this rank's share only**, what flows back through its own rows: the
        caller sums it over the group, as DTensor does for a gradient declared `Partial()`, so that the sum can be a
        reduce-scatter. The gradient of the loss must be the same on all ranks. Double backward is not supported.

    Raises:
        AssertionError: mismatched shapes or dtypes, or `chunk_tokens` below 1.
    """
    _require_fitting(hidden_ND, weight_VD, labels_N, chunk_tokens)
    assert group is not None or vocab_offset == 0, "a shard of the vocabulary needs the group that has the others"
    settings = _Settings(
        chunk_tokens,
        group,
        vocab_offset,
        _matmul_dtype(hidden_ND, weight_VD),
        # Checked here: inside a Function gradients are always off, and needs_input_grad ignores no_grad().
        needs_hidden_grad=torch.is_grad_enabled() and hidden_ND.requires_grad,
        needs_weight_grad=torch.is_grad_enabled() and weight_VD.requires_grad,
        softcap=softcap,
        z_weight=z_loss.weight if z_loss is not None else 0.0,
    )
    loss, squares = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, settings)
    if z_loss is not None and torch.is_grad_enabled():
        z_loss.count(squares, labels_N)
    return loss


def _require_fitting(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> None:
    assert chunk_tokens >= 1, f"chunk_tokens is {chunk_tokens}, it must be at least 1"
    assert hidden_ND.ndim == weight_VD.ndim == 2, f"two matrices, not {hidden_ND.shape} and {weight_VD.shape}"
    assert hidden_ND.shape[1] == weight_VD.shape[1], f"widths differ: {hidden_ND.shape} and {weight_VD.shape}"
    assert labels_N.shape == hidden_ND.shape[:1], f"one label per position: {labels_N.shape} for {hidden_ND.shape}"
    assert labels_N.dtype == torch.int64, f"labels are {labels_N.dtype}, they must be int64"


class _Settings(NamedTuple):
    chunk_tokens: int
    group: dist.ProcessGroup | None
    vocab_offset: int
    dtype: torch.dtype
    """Of the matrix products."""
    needs_hidden_grad: bool
    needs_weight_grad: bool
    softcap: float | None
    z_weight: float


def _matmul_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    device_type = hidden_ND.device.type
    # Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden_ND.dtype, weight_VD.dtype):
        return torch.get_autocast_dtype(device_type)
    assert hidden_ND.dtype == weight_VD.dtype, f"hidden states are {hidden_ND.dtype}, the weight {weight_VD.dtype}"
    return hidden_ND.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes gradients for an incoming gradient of 1 in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, settings: _Settings
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            values_2N, hidden_grad_ND, weight_grad_VD = _losses_and_gradients(hidden_ND, weight_VD, labels_N, settings)
        # The weight's stays float32 until it is scaled: a sum over thousands of positions may overflow float16, and is
        # not rounded twice. Rounding here would not lower the peak: both copies would exist too.
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        nll_N, log_z_N = values_2N
        squares = log_z_N.square().sum()
        ctx.mark_non_differentiable(squares)
        return nll_N.sum(), squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _squares_grad: Tensor) -> tuple[Tensor | None, ...]:
        # New tensors, not scaled in place: with retain_graph this may run again.
        grads = (
            None if grad is None else _scaled(grad, loss_grad, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None


def _losses_and_gradients(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and log Z of each position, shape (2, N), and the gradients of the sum of all losses.

    That for the hidden states is in their dtype, that for the weight in the softmax's.
    """
    num_positions, num_rows = hidden_ND.shape[0], weight_VD.shape[0]
    chunk_tokens = min(settings.chunk_tokens, num_positions)
    dtype = settings.dtype
    softmax_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    needs_grad = settings.needs_hidden_grad or settings.needs_weight_grad

    values_2N = hidden_ND.new_zeros(2, num_positions, dtype=softmax_dtype)
    hidden_grad_ND = torch.zeros_like(hidden_ND) if settings.needs_hidden_grad else None
    weight_grad_VD = torch.zeros_like(weight_VD, dtype=softmax_dtype) if settings.needs_weight_grad else None
    # Buffers shared by all chunks: one for the softmax, and one for the matrix products' operands if their dtype
    # differs. Each holds the logits first and finally their gradient.
    softmax_buffer_CV = hidden_ND.new_empty(chunk_tokens, num_rows, dtype=softmax_dtype)
    matmul_buffer_CV = softmax_buffer_CV if dtype == softmax_dtype else torch.empty_like(softmax_buffer_CV, dtype=dtype)
    weight_VD = weight_VD.to(dtype)  # a copy under autocast only

    for start in range(0, num_positions, settings.chunk_tokens):
        positions = slice(start, start + settings.chunk_tokens)
        hidden_CD = hidden_ND[positions].to(dtype)
        logits_CV = softmax_buffer_CV[: len(hidden_CD)]
        operand_CV = matmul_buffer_CV[: len(hidden_CD)]

        torch.mm(hidden_CD, weight_VD.t(), out=operand_CV)
        if operand_CV.dtype != logits_CV.dtype:
            logits_CV.copy_(operand_CV)
        slope_CV = _softcap_(logits_CV, settings.softcap) if settings.softcap is not None else None
        values_2N[:, positions] = _losses_and_gradient_(logits_CV, labels_N[positions], settings, needs_grad)
        if needs_grad and slope_CV is not None:
            logits_CV.mul_(slope_CV)
        if needs_grad and operand_CV.dtype != logits_CV.dtype:
            operand_CV.copy_(logits_CV)
        if hidden_grad_ND is not None:
            hidden_grad_ND[positions] = operand_CV @ weight_VD
        if weight_grad_VD is not None:
            _add_product_(weight_grad_VD, operand_CV, hidden_CD)
    return values_2N, hidden_grad_ND, weight_grad_VD


def _softcap_(logits_CV: Tensor, softcap: float) -> Tensor:
    """Overwrites the logits with softcap * tanh(logits / softcap); the derivative."""
    logits_CV.div_(softcap).tanh_()
    slope_CV = 1 - logits_CV.square()
    logits_CV.mul_(softcap)
    return slope_CV


def _losses_and_gradient_(logits_CV: Tensor, labels_C: Tensor, settings: _Settings, needs_grad: bool) -> Tensor:
    """Losses and log Z of a chunk, shape (2, C); overwrites `logits_CV` with the gradient of the losses, if needed."""
    num_positions, num_rows = logits_CV.shape
    local_C = labels_C - settings.vocab_offset
    is_here_C = (local_C >= 0) & (local_C < num_rows)
    position_C = torch.arange(num_positions, device=labels_C.device)
    row_C = local_C.where(is_here_C, 0)

    # An empty shard contributes the neutral elements.
    stats_3C = logits_CV.new_full((3, num_positions), -torch.inf)
    own_max_C, own_sum_C, own_label_C = stats_3C
    if num_rows > 0:
        torch.amax(logits_CV, dim=1, out=own_max_C)
        own_label_C.copy_(logits_CV[position_C, row_C].masked_fill(~is_here_C, -torch.inf))
        logits_CV.sub_(own_max_C.unsqueeze(1)).exp_()
    torch.sum(logits_CV, dim=1, out=own_sum_C)

    # Gathered, not reduced: a maximum and a sum relative to it would take two collectives in sequence.
    max_RC, sum_RC, label_RC = gathered(stats_3C, settings.group).unbind(1)
    max_C = max_RC.amax(dim=0)
    sum_C = (sum_RC * (max_RC - max_C).exp()).sum(dim=0)
    # Subtract the two large numbers first, or their difference loses its digits.
    nll_C = (max_C - label_RC.amax(dim=0)) + sum_C.log()
    log_z_C = max_C + sum_C.log()
    ignored_C = labels_C == IGNORE_INDEX

    if needs_grad and num_rows > 0:
        scale_C = (own_max_C - max_C).exp() / sum_C
        scale_C.masked_fill_(nll_C.isinf(), torch.nan)  # no rank has a row for this label
        scale_C.masked_fill_(ignored_C, 0.0)
        if settings.z_weight:
            scale_C.mul_(1.0 + 2.0 * settings.z_weight * log_z_C)
        logits_CV.mul_(scale_C.unsqueeze(1))
        # Indexing each position once is deterministic on every device; scatter_add_ is not.
        logits_CV[position_C, row_C] -= is_here_C.to(logits_CV.dtype)
    return torch.stack((nll_C, log_z_C)).masked_fill_(ignored_C, 0.0)


def _add_product_(weight_grad_VD: Tensor, logits_grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """weight_grad += logits_grad^T @ hidden; the operands may have a narrower dtype than the sum."""
    if logits_grad_CV.dtype == weight_grad_VD.dtype:
        weight_grad_VD.addmm_(logits_grad_CV.t(), hidden_CD)
        return
    for start in range(0, len(weight_grad_VD), SLICE_ROWS):
        rows = slice(start, start + SLICE_ROWS)
        weight_grad_VD[rows] += logits_grad_CV[:, rows].t() @ hidden_CD


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`, multiplied in the dtype of the (scalar) factor."""
    if grad.dtype == factor.dtype == dtype:
        return grad * factor
    # With a dimension the factor takes part in type promotion. A GPU would round a scalar to the gradient's dtype
    # first, and 1 / (number of tokens) in bfloat16 is off by up to 0.4%, for all gradients alike.
    factor = factor.reshape(1, 1)
    scaled = torch.empty_like(grad, dtype=dtype)
    for start in range(0, len(grad), SLICE_ROWS):
        rows = slice(start, start + SLICE_ROWS)
        scaled[rows] = grad[rows] * factor
    return scaled
