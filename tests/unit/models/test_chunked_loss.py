"""Chunked against plain cross-entropy: values, precision, autograd, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.unit.models.plain_loss import LOSS_GRAD, N, Operations, V, grads_of, inputs, plain, relative
from titan_growth.models import chunked_loss
from titan_growth.models.chunked_loss import chunked_cross_entropy_sum
from titan_growth.tools.labels import IGNORE_INDEX

# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [V, 2, 128])
@pytest.mark.parametrize("chunk_tokens", [1, 3, N - 1, N, N + 5])
def test_loss_and_gradients_equal_the_plain_ones(chunk_tokens: int, vocab: int) -> None:
    hidden, weight, labels = inputs(vocab)
    reference = plain(hidden, weight, labels)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    assert relative(loss, reference) < 1e-6
    for grad, expected in zip(grads_of(loss, hidden, weight), grads_of(reference, hidden, weight), strict=True):
        assert relative(grad, expected) < 1e-6


def test_float64_is_computed_in_float64() -> None:
    hidden, weight, labels = inputs(dtype=torch.float64)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=3)
    assert loss.dtype == torch.float64
    assert relative(loss, plain(hidden, weight, labels)) < 1e-14
    with torch.autocast("cpu", dtype=torch.bfloat16):  # leaves float64 alone
        assert torch.equal(loss, chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=3))
    assert torch.autograd.gradcheck(
        lambda hidden, weight: chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=5), (hidden, weight)
    )


def test_ignored_positions_have_exactly_zero_gradient() -> None:
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
    (grad,) = grads_of(loss, hidden)
    is_zero = (grad == 0).all(dim=1)
    assert torch.equal(is_zero, labels == IGNORE_INDEX)


@pytest.mark.parametrize("num_positions", [N, 0])
def test_nothing_to_learn_is_loss_zero(num_positions: int) -> None:
    hidden, weight, labels = inputs()
    labels = torch.full_like(labels, IGNORE_INDEX)[:num_positions]
    loss = chunked_cross_entropy_sum(hidden[:num_positions], weight, labels, chunk_tokens=4)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()  # NaN counts as True
    assert not weight.grad.any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits(scale: float) -> None:
    hidden, weight, labels = inputs(scale=scale)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
    reference = plain(hidden, weight, labels)
    assert (hidden @ weight.t()).abs().max().item() > 1e4
    assert math.isfinite(loss.item())
    assert relative(loss, reference) < 1e-6
    for grad, expected in zip(grads_of(loss, hidden, weight), grads_of(reference, hidden, weight), strict=True):
        assert relative(grad, expected) < 1e-6


def test_a_small_loss_of_huge_logits() -> None:
    """Two words share the largest logit, about 10,000; the loss is log 2 to all digits."""
    hidden, weight, _ = inputs(scale=1e4)
    weight = torch.cat((weight, weight)).detach()
    labels = (hidden @ weight.t()).argmax(dim=1)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
    assert loss.item() == pytest.approx(N * math.log(2), rel=1e-6)


@pytest.mark.parametrize("label", [V, V + 1000, -1, -101])
def test_a_label_outside_the_vocabulary_is_not_passed_over(label: int) -> None:
    hidden, weight, labels = inputs()
    labels[1] = label
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
    loss.backward()
    assert loss.item() == math.inf
    assert hidden.grad[1].isnan().all()
    assert weight.grad.isnan().all()


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [3, N])
@pytest.mark.parametrize("slice_rows", [4096, 5])
def test_bfloat16(chunk_tokens: int, slice_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one rounding (2^-8) further from the exact result than the plain loss: that of the final scaling."""
    monkeypatch.setattr(chunked_loss, "SLICE_ROWS", slice_rows)
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    assert relative(loss, plain(hidden, weight, labels)) < 1e-6  # the same logits, and float32 from there
    grads = grads_of(loss, hidden, weight)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = grads_of(plain(*exact_inputs, labels), *exact_inputs)
    usual = grads_of(plain(hidden, weight, labels), hidden, weight)
    for grad, usual_grad, exact_grad in zip(grads, usual, exact, strict=True):
        error, usual_error = (relative(value.double(), exact_grad) for value in (grad, usual_grad))
        assert error < usual_error + 2**-8


@pytest.mark.parametrize("tokens", [3001, 4099, 771])
def test_the_incoming_gradient_is_not_rounded_to_bfloat16(tokens: int) -> None:
    """1 / tokens in bfloat16 would scale all gradients by the same wrong factor."""
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
    (hidden_grad,) = torch.autograd.grad(loss, (hidden,), retain_graph=True)
    # The same products with a float32 weight: its gradient is what the bfloat16 weight's was rounded from.
    wide_weight = weight.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide_loss = chunked_cross_entropy_sum(hidden, wide_weight, labels, chunk_tokens=4)
    (weight_grad,) = torch.autograd.grad(wide_loss, (wide_weight,))
    factor = torch.ones(1) / tokens
    with Operations() as operations:
        scaled = torch.autograd.grad(loss / tokens, (hidden, weight))
    # A CPU keeps a scalar's precision whatever the dtypes; a GPU needs type promotion for it.
    products = [dtype for name, dtype in zip(operations.names, operations.dtypes, strict=True) if name == "mul"]
    assert products == [torch.float32] * 2
    assert torch.equal(scaled[0], (hidden_grad.float() * factor).to(torch.bfloat16))
    assert torch.equal(scaled[1], (weight_grad * factor).to(torch.bfloat16))


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast(hidden_dtype: torch.dtype) -> None:
    """As in a float32 model under autocast: products in bfloat16, gradients in the dtypes of the inputs."""
    hidden, weight, labels = inputs()
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4)
        reference = plain(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert relative(loss, reference) < 1e-6
    without = plain(hidden.float(), weight, labels)
    assert relative(loss, without) > 1e-5, "autocast had no effect"
    for grad, expected in zip(grads_of(loss, hidden, weight), grads_of(reference, hidden, weight), strict=True):
        assert relative(grad, expected) < 0.02


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    hidden, weight, labels = inputs()
    for args, options, message in [
        ((hidden, weight, labels), {"chunk_tokens": 0}, "chunk_tokens"),
        ((hidden, weight.bfloat16(), labels), {"chunk_tokens": 4}, "torch.bfloat16"),
        ((hidden, weight[:, 1:], labels), {"chunk_tokens": 4}, "widths"),
        ((hidden, weight, labels[1:]), {"chunk_tokens": 4}, "one label per position"),
        ((hidden, weight, labels.int()), {"chunk_tokens": 4}, "int64"),
        ((hidden, weight, labels), {"chunk_tokens": 4, "vocab_offset": 3}, "group"),
    ]:
        with pytest.raises(AssertionError, match=message):
            chunked_cross_entropy_sum(*args, **options)


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden_needs", "weight_needs", "products_per_chunk"), [(True, True, 3), (True, False, 2), (False, True, 2)]
)
def test_only_the_gradients_asked_for_are_computed(
    hidden_needs: bool, weight_needs: bool, products_per_chunk: int
) -> None:
    hidden, weight, labels = inputs()
    expected = grads_of(plain(hidden, weight, labels), hidden, weight)
    hidden = hidden.detach().requires_grad_(hidden_needs)
    weight = weight.detach().requires_grad_(weight_needs)
    with Operations() as operations:
        loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=N)
    assert operations.num_products == products_per_chunk
    (loss * LOSS_GRAD).backward()
    for tensor, needs, grad in zip((hidden, weight), (hidden_needs, weight_needs), expected, strict=True):
        assert (tensor.grad is not None) == needs
        if needs:
            assert relative(tensor.grad, grad) < 1e-6


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detached"])
def test_without_gradients_none_is_computed(how: str) -> None:
    hidden, weight, labels = inputs()
    reference = plain(hidden, weight, labels).detach()
    if how == "detached":
        hidden, weight = hidden.detach(), weight.detach()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "detached": torch.enable_grad}[how]
    with context(), Operations() as operations:
        loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=N)
    assert operations.num_products == 1
    assert not loss.requires_grad
    assert relative(loss, reference) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_gives_the_same_twice(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype=dtype)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4) * LOSS_GRAD
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()  # gradients belong to the caller
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(kept, second, strict=True))


def test_differentiating_twice_is_refused() -> None:
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_tokens=4) ** 2
    (grad,) = torch.autograd.grad(loss, (hidden,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant: bool) -> None:
    hidden, weight, labels = inputs()
    expected = grads_of(plain(hidden, weight, labels), hidden, weight)

    def head(hidden: Tensor) -> Tensor:
        return chunked_cross_entropy_sum(hidden * 1.0, weight, labels, chunk_tokens=4)

    (checkpoint(head, hidden, use_reentrant=use_reentrant) * LOSS_GRAD).backward()
    for tensor, grad in zip((hidden, weight), expected, strict=True):
        assert relative(tensor.grad, grad) < 1e-6


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_never_more_than_a_chunk_of_logits(mode: str) -> None:
    num_positions, width, vocab, chunk_tokens = 64, 4, 100, 8
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    hidden = torch.randn(num_positions, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (num_positions,))
    largest = {}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        for name, loss_of in {
            "plain": plain,
            "chunked": lambda *args: chunked_cross_entropy_sum(*args, chunk_tokens=chunk_tokens),
        }.items():
            with Operations() as operations:
                loss_of(hidden, weight, labels).backward()
            largest[name] = operations.largest
    assert largest["plain"] == num_positions * vocab
    assert largest["chunked"] == max(chunk_tokens * vocab, num_positions * width, vocab * width)
