"""The plain cross-entropy, and inputs for it, that the chunked one is tested against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_growth.tools.labels import IGNORE_INDEX

N, D, V = 13, 8, 37
LOSS_GRAD = 0.37


def inputs(vocab: int = V, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = (torch.randn(N, D, generator=generator) * scale).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, D, generator=generator).to(dtype).requires_grad_()
    labels_N = torch.randint(0, vocab, (N,), generator=generator)
    labels_N[[0, 4, 5, N - 1]] = IGNORE_INDEX
    return hidden_ND, weight_VD, labels_N


def plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


def grads_of(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors, torch.tensor(LOSS_GRAD, dtype=loss.dtype))


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert value.shape == reference.shape
    assert value.dtype == reference.dtype
    return ((value - reference).abs().max() / reference.abs().max()).item()


class Operations(TorchDispatchMode):
    """Names of the operations that run, the dtypes of their results, and the size of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: list[torch.dtype | None] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.dtypes.append(getattr(result, "dtype", None))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result

    @property
    def num_products(self) -> int:
        return sum(name in ("mm", "addmm_") for name in self.names)
