"""The parts of an attention block under common names, whichever library it is from: norms, projections, scales, MLP.

Parts are read from the module whenever they are used, since a tower's conversion to half precision replaces some.

Source: open_clip 3.3.0 src/open_clip/transformer.py `ResidualAttentionBlock`; timm 1.0.31
timm/models/vision_transformer.py `Block`, timm/models/eva.py `EvaBlock`, timm/layers/attention.py.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maple.clip.cpu_linear import frozen_linear, is_exporting_or_compiling, is_transforming
from maple.clip.plain_model import PlainBlock, is_quick_gelu

LinearWeights = tuple[Tensor, Tensor | None]
"""Weight [H_out, H_in] and bias [H_out] of a linear layer."""

_STEEPNESS = 1.702
"""QuickGELU's a."""


class OpenClipParts:
    """Where open_clip's residual attention block has its parts."""

    packed = True
    """Whether queries, keys and values are one projection."""
    head_norms: Mapping[str, nn.Module] = {}
    """Norms of each head of the queries and keys, by kind: q, k."""

    def __init__(self, module: Any) -> None:
        self.module = module
        layers = list(module.mlp)
        self._plain_mlp = len(layers) == 3 and type(layers[0]) is type(layers[2]) is nn.Linear
        self.head_count, self.head_width = int(module.attn.num_heads), int(module.attn.head_dim)

    @property
    def norms(self) -> tuple[Any, Any]:
        """The norms before the attention and before the MLP."""
        return self.module.ln_1, self.module.ln_2

    def projection(self, kinds: str) -> LinearWeights:
        """The packed projection of consecutive `kinds` of q, k, v; of one of them where they are not packed."""
        attention = self.module.attn
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        return part_of_packed(weight, kinds), None if bias is None else part_of_packed(bias, kinds)

    @property
    def output(self) -> LinearWeights:
        """The output projection of the attention."""
        return self.module.attn.out_proj.weight, self.module.attn.out_proj.bias

    def before_output(self, joined: Tensor) -> Tensor:
        """What is applied to the joined heads [..., H] before the output projection."""
        return joined

    def scale(self, which: int, branch: Tensor) -> Tensor:
        """Scale the branch of the attention (0) or of the MLP (1), before it is added to the states."""
        return cast(Tensor, (self.module.ls_1, self.module.ls_2)[which](branch))

    def mlp(self, hidden: Tensor) -> Tensor:
        """The MLP, of normed states [..., H]."""
        if not self._plain_mlp:
            return cast(Tensor, self.module.mlp(hidden))
        first, activation, second = self.module.mlp
        hidden = frozen_linear(hidden, first.weight, first.bias)
        hidden = quick_gelu(hidden) if is_quick_gelu(activation) else activation(hidden)
        return frozen_linear(hidden, second.weight, second.bias)


def quick_gelu(states: Tensor) -> Tensor:
    """QuickGELU, x * sigmoid(a x), as SiLU: silu(a x) / a.

    Its gradient is that of SiLU at a x, without the two products with a and 1 / a that the chain rule would compute.
    """
    if is_exporting_or_compiling() or is_transforming():
        return F.silu(_STEEPNESS * states) / _STEEPNESS
    return cast(Tensor, _QuickGELU.apply(states))


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, states: Tensor) -> Tensor:
        context.save_for_backward(states)
        return F.silu(_STEEPNESS * states, inplace=True).div_(_STEEPNESS)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        scaled = _STEEPNESS * context.saved_tensors[0]
        if torch.is_grad_enabled():  # for a second derivative, which the operator below does not have
            share = scaled.sigmoid()
            return cast(Tensor, gradient * share * (1 + scaled * (1 - share)))
        return cast(Tensor, torch.ops.aten.silu_backward(gradient, scaled))


def parts_of(module: Any) -> OpenClipParts | str:
    """The parts of a block, or why they cannot be changed: in words that follow "this block has" in a message."""
    if isinstance(module, PlainBlock):
        return OpenClipParts(module)
    from open_clip.transformer import ResidualAttentionBlock

    from maple.clip.towers.timm_parts import timm_parts

    if type(module) is not ResidualAttentionBlock:
        return timm_parts(module)
    attention: Any = getattr(module, "attn", None)
    usual = (
        type(attention) is nn.MultiheadAttention
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not hasattr(module, "ln_1_kv")
    )
    return OpenClipParts(module) if usual else "an attention of another form than CLIP's"


def first_norm(module: Any) -> Any:
    """The norm that a block applies to its input, standard or not; None where there is no such norm."""
    if hasattr(module, "ln_1"):
        return module.ln_1
    from maple.clip.towers.timm_parts import BLOCKS

    return module.norm1 if type(module) in BLOCKS else None


def part_of_packed(packed: Tensor, kinds: str) -> Tensor:
    """The rows of consecutive `kinds` of q, k, v in a packed weight [3 H, ...] or bias [3 H]."""
    width, first = len(packed) // 3, "qkv".index(kinds)
    return packed[first * width : (first + len(kinds)) * width]
