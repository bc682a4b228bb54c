"""The parts of timm's attention blocks under the names of `block_parts.py`; imported only for backbones of timm's.

Source: timm 1.0.31 timm/models/vision_transformer.py `Block`, timm/models/eva.py `EvaBlock`, timm/layers/attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import Mlp, SwiGLU, apply_rot_embed_cat
from timm.models.eva import AttentionRope, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from maple.clip.cpu_linear import frozen_linear
from maple.clip.towers.block_parts import LinearWeights, OpenClipParts, part_of_packed

BLOCKS = (TimmBlock, EvaBlock)


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
        weight = part_of_packed(attention.qkv.weight, kinds)
        if attention.qkv.bias is not None:
            return weight, part_of_packed(attention.qkv.bias, kinds)
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


def timm_parts(module: Any) -> OpenClipParts | str:
    """The parts of a block, or why they cannot be changed: see `parts_of`."""
    attention: Any = getattr(module, "attn", None)
    kind = type(module)
    if kind not in BLOCKS:
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
