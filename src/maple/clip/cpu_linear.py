"""Products of states with frozen weights, on CPUs by oneDNN.

PyTorch gives float32 products to its BLAS, on x86 to MKL, which on processors of another make than Intel's stays below
AVX-512; oneDNN, which PyTorch carries too, asks the processor only what it can do. Measured on an AMD EPYC: twice the
operations a second, forwards and backwards, from a hundred rows on. bfloat16 products go to oneDNN anyway; here the
bias is added on the way, which PyTorch does not ask for: a tenth more operations a second.

Source: torch/_inductor/mkldnn_lowerings.py calls the same operator for the linear layers of compiled models.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from maple.clip.tracing import is_recorded


def _found() -> Any:
    """The operator, or None where this PyTorch has none, or a BLAS that is not MKL."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    try:
        ones = torch.ones(2, 3)
        right = operator is not None and bool((operator(ones, ones, None, "none", [], "") == 3).all())
    except (RuntimeError, TypeError):
        return None
    return operator if right else None


_OPERATOR = _found()
# oneDNN does bfloat16 on processors with AVX-512 only.
_HALF = _OPERATOR is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
_TYPES = (torch.float32, torch.bfloat16) if _HALF else (torch.float32,)


def frozen_linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `torch.nn.functional.linear` gives, of [..., H_in] and [H_out, H_in]: [..., H_out]."""
    if not _fits(states, weight, bias):
        return F.linear(states, weight, bias)
    if states.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _FrozenLinear.apply(states, weight, bias))
    return _product(states, weight, bias)


def _fits(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _OPERATOR is not None
        and states.device.type == weight.device.type == "cpu"
        and states.dtype == weight.dtype
        and states.dtype in _TYPES
        and (bias is None or bias.dtype == states.dtype)
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not is_recorded()
        and not _transformed()
        and states.numel() > 0
    )


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which do not know the operator."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, _OPERATOR(states, weight, bias, "none", [], ""))


class _FrozenLinear(torch.autograd.Function):
    """Its weights need no gradient; that of the states is a product of the same kind."""

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return _product(states, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return frozen_linear(gradient, weight.t()), None, None


def _operations(states: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Two a multiply-add, as torch.utils.flop_counter counts."""
    rows = 1
    for size in states[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


# For `FlopCounterMode(custom_mapping=FLOPS)`, which knows the operators of PyTorch's own front only.
FLOPS = {} if _OPERATOR is None else {torch.ops.mkldnn._linear_pointwise: _operations}
