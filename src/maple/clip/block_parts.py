"""The parts of an attention block under common names, whichever library it is from: norms, projections, scales, MLP.

Parts are read from the module whenever they are used, since a tower's conversion to half precision replaces some.

Source: open_clip 3.3.0 src/open_clip/transformer.py `ResidualAttentionBlock`; timm 1.0.31
timm/models/vision_transformer.py `Block`, timm/models/eva.py `EvaBlock`, timm/layers/attention.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from timm.layers import Mlp, SwiGLU, apply_rot_embed_cat
from timm.models.eva import AttentionRope, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from maple.clip.cpu_linear import frozen_linear

LinearWeights = tuple[Tensor, Tensor | None]
"""Weight [H_out, H_in] and bias [H_out] of a linear layer."""


@dataclass(frozen=True)
class Rotation:
    """Rotary positions of patches: all rows before and after these, such as prompts, are left as they are.

    Attributes:
        table: returns sines and cosines [N, 2 d] or [heads, N, 2 d] of N patches, d the channels of a head.
        first: the number of rows before the patches.
        half: whether channels are paired with those half the width away, in place of their neighbours.

    Source: timm 1.0.31 timm/layers/attention.py `AttentionRope.forward`.
    """

    table: Callable[[], Tensor]
    first: int
    half: bool = False

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate queries or keys [B, heads, n, d] in the rows of patches: [B, heads, n, d]."""
        table = self.table()
        end = self.first + table.shape[-2]
        patches: Tensor = apply_rot_embed_cat(heads[:, :, self.first : end], table, half=self.half)
        return torch.cat([heads[:, :, : self.first], patches.to(heads.dtype), heads[:, :, end:]], dim=2)

    def of_rows(self, count: int) -> Tensor:
        """The table of all of `count` rows but the first ones; rows after the patches are rotated by zero."""
        table = self.table()
        zeros = table.new_zeros(*table.shape[:-2], count - self.first - table.shape[-2], table.shape[-1] // 2)
        return torch.cat([table, torch.cat([zeros, zeros + 1], dim=-1)], dim=-2)


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
        return _part(weight, kinds), None if bias is None else _part(bias, kinds)

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
        # QuickGELU is x * sigmoid(a x). As SiLU it is one kernel that keeps one tensor for the gradient.
        quick = type(activation) is QuickGELU
        hidden = F.silu(1.702 * hidden) / 1.702 if quick else activation(hidden)
        return frozen_linear(hidden, second.weight, second.bias)


class TimmParts(OpenClipParts):
    """Where timm's blocks, those of EVA and of the Perception Encoder included, have their parts."""

    def __init__(self, module: Any) -> None:
        self.module = module
        attention = module.attn
        self.packed = attention.qkv is not None if hasattr(attention, "q_proj") else True
        self.head_count, self.head_width = int(attention.num_heads), int(attention.head_dim)
        norms = {"q": attention.q_norm, "k": attention.k_norm}
        self.head_norms = {kind: norm for kind, norm in norms.items() if not isinstance(norm, nn.Identity)}

    @property
    def norms(self) -> tuple[Any, Any]:
        return self.module.norm1, self.module.norm2

    def projection(self, kinds: str) -> LinearWeights:
        attention = self.module.attn
        if not self.packed:
            layer = getattr(attention, f"{kinds}_proj")
            return layer.weight, layer.bias
        weight = _part(attention.qkv.weight, kinds)
        if attention.qkv.bias is not None:
            return weight, _part(attention.qkv.bias, kinds)
        if getattr(attention, "q_bias", None) is None:
            return weight, None
        return weight, torch.cat([getattr(attention, f"{kind}_bias") for kind in kinds])

    @property
    def output(self) -> LinearWeights:
        return self.module.attn.proj.weight, self.module.attn.proj.bias

    def before_output(self, joined: Tensor) -> Tensor:
        norm = getattr(self.module.attn, "norm", None)
        return joined if norm is None else cast(Tensor, norm(joined))

    def scale(self, which: int, branch: Tensor) -> Tensor:
        if isinstance(self.module, EvaBlock):
            gamma = (self.module.gamma_1, self.module.gamma_2)[which]
            return branch if gamma is None else gamma * branch
        return cast(Tensor, (self.module.ls1, self.module.ls2)[which](branch))

    def mlp(self, hidden: Tensor) -> Tensor:
        mlp = self.module.mlp
        # Dropout is left out: a tower is always in evaluation mode.
        if type(mlp) is Mlp and type(mlp.fc1) is type(mlp.fc2) is nn.Linear:
            hidden = mlp.act(frozen_linear(hidden, mlp.fc1.weight, mlp.fc1.bias))
        elif type(mlp) is SwiGLU:
            gate = mlp.act(frozen_linear(hidden, mlp.fc1_g.weight, mlp.fc1_g.bias))
            hidden = gate * frozen_linear(hidden, mlp.fc1_x.weight, mlp.fc1_x.bias)
        else:
            return cast(Tensor, mlp(hidden))
        return frozen_linear(mlp.norm(hidden), mlp.fc2.weight, mlp.fc2.bias)


def parts_of(module: Any) -> OpenClipParts | str:
    """The parts of a block, or why they cannot be changed: in words that follow "this block has" in a message."""
    attention: Any = getattr(module, "attn", None)
    kind = type(module)
    if kind is ResidualAttentionBlock:
        usual = (
            type(attention) is nn.MultiheadAttention
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
            and not hasattr(module, "ln_1_kv")
        )
        return OpenClipParts(module) if usual else "an attention of another form than CLIP's"
    if kind not in (TimmBlock, EvaBlock):
        return f"the structure of {kind.__name__}, whose norms do not come before its attention and MLP alone"
    if type(attention) not in (TimmAttention, AttentionRope, EvaAttention):
        return f"a {type(attention).__name__} in place of the usual attention"
    if getattr(attention, "gate", None) is not None:
        return "a gate on its attention"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return "fewer heads of keys than of queries"
    norms = module.norm1, module.norm2
    if not all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms):
        return f"a {type(norms[0]).__name__} in place of a layer norm with weight and bias"
    width = int(norms[0].normalized_shape[-1])
    if int(attention.num_heads) * int(attention.head_dim) != width or attention.proj.out_features != width:
        return "an attention that is not as wide as the tower"
    return TimmParts(module)


def first_norm(module: Any) -> Any:
    """The norm that a block applies to its input, standard or not; None where there is no such norm."""
    if hasattr(module, "ln_1"):
        return module.ln_1
    return module.norm1 if type(module) in (TimmBlock, EvaBlock) else None


def _part(packed: Tensor, kinds: str) -> Tensor:
    """The rows of consecutive `kinds` of q, k, v in a packed weight [3 H, ...] or bias [3 H]."""
    width, first = len(packed) // 3, "qkv".index(kinds)
    return packed[first * width : (first + len(kinds)) * width]
