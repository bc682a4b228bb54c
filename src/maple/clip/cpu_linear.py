"""Linear layers with frozen weights on CPUs, computed by oneDNN.

PyTorch sends float32 products to its BLAS: on x86 that is MKL, which stays below AVX-512 on processors not made by
Intel. oneDNN, which PyTorch also ships, only checks what the processor supports. Measured on an AMD EPYC, it does
twice the operations per second, forward and backward, from a hundred rows on. On one with AVX2 alone both libraries
do as many operations per second: oneDNN gains by the bias where products are large, and MKL by shorter calls where
they are small. On an Intel Xeon with AVX-512 oneDNN gains nothing in float32, and its gradients take up to twice as
long. PyTorch already uses oneDNN for bfloat16; here the bias is added in the same call, which is a tenth faster.

Source: torch/_inductor/mkldnn_lowerings.py calls the same operator for the linear layers of compiled models.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def is_exporting_or_compiling() -> bool:
    """Whether the call is being recorded: by TorchScript, `torch.export` or `torch.compile`."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]


def is_transforming() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which know PyTorch's own functions alone."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def processor_facts() -> Mapping[str, Any]:
    """What `torch.cpu.get_capabilities` says; nothing in PyTorch 2.6, which does not have it."""
    facts: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return facts


def _load_operator() -> Any:
    """The oneDNN operator; None if this PyTorch does not have it, or uses a BLAS other than MKL."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    try:
        ones = torch.ones(2, 3)
        right = operator is not None and bool((operator(ones, ones, None, "none", [], "") == 3).all())
    except (RuntimeError, TypeError):
        return None
    return operator if right else None


_OPERATOR = _load_operator()
# oneDNN supports bfloat16 on processors with AVX-512 only.
_BFLOAT16 = _OPERATOR is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
# Where PyTorch does not name the processor, float32 is computed as for other makes.
_INTEL = str(processor_facts().get("cpu_name", "")).startswith("Intel")
_DTYPES = [dtype for dtype, used in ((torch.float32, not _INTEL), (torch.bfloat16, _BFLOAT16)) if used]
_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
_LEAST = 2**24 if _AVX2 else 1
"""From this number of multiply-adds on, oneDNN is used; its calls take 40 microseconds longer (measured with AVX2)."""


def frozen_linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of [..., H_in] with a frozen weight [H_out, H_in]: [..., H_out]."""
    if not _is_supported(states, weight, bias):
        return F.linear(states, weight, bias)
    if states.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _FrozenLinear.apply(states, weight, bias))
    return _product(states, weight, bias)


def _is_supported(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _OPERATOR is not None
        and not is_exporting_or_compiling()
        and states.numel() * weight.shape[0] >= _LEAST
        and states.device.type == weight.device.type == "cpu"
        and states.dtype == weight.dtype
        and states.dtype in _DTYPES
        and (bias is None or bias.dtype == states.dtype)
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not is_transforming()
    )


def _product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, _OPERATOR(states, weight, bias, "none", [], ""))


class _FrozenLinear(torch.autograd.Function):
    """The weights need no gradient, and the gradient of the states is another frozen linear layer."""

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return _product(states, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        # oneDNN rearranges a transposed weight again for each part of the rows. With 788 rows of ViT-B/16, that takes
        # up to as long as the product (two cores with AVX2). MKL reads it as it is.
        if _AVX2 and gradient.dtype == torch.float32:
            return gradient @ weight, None, None
        return frozen_linear(gradient, weight.t()), None, None


def _operations(states: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Two FLOPs for each multiply-add, as torch.utils.flop_counter counts."""
    return 2 * math.prod(states[:-1]) * weight[0] * weight[1]


# For `FlopCounterMode(custom_mapping=FLOPS)`, which does not know this operator.
FLOPS = {} if _OPERATOR is None else {torch.ops.mkldnn._linear_pointwise: _operations}
