"""Whether a call is recorded for an export, rather than computed."""

import torch


def is_exporting_or_compiling() -> bool:
    """Whether TorchScript follows the call: sizes are then tensors, and one that is looked at becomes a constant."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_recorded() -> bool:
    """Whether the call is followed by anything: TorchScript, `torch.export` or `torch.compile`."""
    return is_exporting_or_compiling() or torch.compiler.is_compiling()
