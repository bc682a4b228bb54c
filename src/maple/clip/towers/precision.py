"""Convert open_clip's modules to half precision as its `precision` does, but after they were fingerprinted."""

import torch
from torch import nn


def convert_part(part: nn.Module, dtype: torch.dtype) -> None:
    """Convert the large weights of `part` to `dtype`; norms stay in float32.

    It also converts what open_clip leaves out: layer and head scales.
    """
    if dtype == torch.float32:
        return
    from open_clip.model import convert_weights_to_lp
    from open_clip.transformer import Attention, LayerScale

    scales = {LayerScale: ("gamma",), Attention: ("head_scale", "logit_scale")}
    for module in part.modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, child_name, float32_norm(child))
        for name in scales.get(type(module), ()):
            if (scale := getattr(module, name)) is not None:
                scale.data = scale.data.to(dtype)
    convert_weights_to_lp(part, dtype)


def float32_norm(norm: nn.Module) -> nn.Module:
    """The same norm, computed in float32 whatever its input."""
    from open_clip.transformer import LayerNorm, LayerNormFp32

    if type(norm) is not LayerNorm:
        return norm
    copy = LayerNormFp32(norm.normalized_shape, eps=norm.eps)
    copy.weight, copy.bias = norm.weight, norm.bias
    return copy.eval()  # type: ignore[no-any-return]
