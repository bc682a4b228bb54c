"""timm's vision transformers: those of SigLIP, MobileCLIP, ViTamin, EVA and the Perception Encoder."""

from functools import partial
from typing import Any, cast

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from maple.clip.edits import NO_EDIT, LayerEdit
from maple.clip.towers.base import ImageTower
from maple.clip.towers.blocks import Block
from maple.clip.towers.timm_parts import Rotation


def obstacle_of(trunk: Any) -> str | None:
    """Why prompts cannot enter a timm model, in words that follow "but" in a message; None if they can."""
    if type(trunk) not in (VisionTransformer, Eva):
        return f"its image tower is timm's {type(trunk).__name__}, not a plain vision transformer"
    if trunk.attn_pool is None and not trunk.global_pool:
        return "its image tower does not pool the states of an image"
    return None


class TimmImageTower(ImageTower):
    """A vision transformer of timm; prompts have no rotary positions, and pooling never reads them.

    Weights stay in float32, and each stage runs under autocast in half precision, as timm expects.

    Source: timm 1.0.31 timm/models/vision_transformer.py `VisionTransformer`, timm/models/eva.py `Eva`; open_clip 3.3.0
    src/open_clip/timm_model.py.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._tower: Any = model.visual
        self._trunk: Any = model.visual.trunk
        obstacle = obstacle_of(self._trunk)
        blocks = [] if obstacle else [Block(block, self._rotation(n)) for n, block in enumerate(self._trunk.blocks)]
        super().__init__(model, dtype, obstacle, blocks)
        if obstacle is None:
            self.width = int(self._trunk.embed_dim)
            self.first_patch = int(self._trunk.num_prefix_tokens)
            self.pools_by_attention = self._trunk.attn_pool is not None
            self.pools_class_token = not self.pools_by_attention and self._trunk.global_pool == "token"

    def embed(self, images: Tensor) -> Tensor:
        """Class and register tokens, if any, and N patches with positions, before the pre-norm: [B, n, Hv].

        Raises:
            ImageError: the images are not [B, 3, R, R].
        """
        self.check_images(images)
        with self.autocast(images.device.type):
            embedded = self._trunk._pos_embed(self._trunk.patch_embed(images.to(self._full)))
        states: Tensor = embedded[0] if isinstance(self._trunk, Eva) else embedded  # without EVA's rotary positions
        return states.to(self.dtype)

    def enter(self, states: Tensor) -> Tensor:
        """The layer norm before the blocks, where there is one: [B, n, Hv] -> [B, n, Hv]."""
        with self.autocast(states.device.type):
            return cast(Tensor, self._trunk.norm_pre(states)).to(self.dtype)

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, *, first_row_only: bool = False) -> Tensor:
        """Block `layer`: [B, n, Hv] -> [B, n, Hv], or its class token alone, [B, 1, Hv]."""
        with self.autocast(states.device.type):
            return self._blocks[layer].full(states, edit, first_row_only).to(self.dtype)

    def block_with_attention(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT) -> tuple[Tensor, Tensor]:
        """Block `layer` and its attention weights: [B, n, Hv] -> [B, n, Hv] and [B, heads, n, n]; differentiable."""
        with self.autocast(states.device.type):
            states, attention = super().block_with_attention(layer, states, edit)
        return states.to(self.dtype), attention

    def finish(self, states: Tensor) -> Tensor:
        """Pool, normalise and project the rows that `embed` made, without prompts: [B, n, Hv] to [B, D].

        The class token alone, [B, 1, Hv], is enough if `pools_class_token`.
        """
        with self.autocast(states.device.type):
            pooled = self._trunk.forward_head(self._trunk.norm(states))
            return cast(Tensor, self._tower.head(pooled))

    def finish_tokens(self, states: Tensor) -> Tensor:
        """The final norm of rows [B, K, Hv] that are not pooled, without the projection: [B, K, Hv]."""
        self.require_token_features("this method")
        with self.autocast(states.device.type):
            return cast(Tensor, self._trunk.fc_norm(self._trunk.norm(states)))

    def project(self, rows: Tensor) -> Tensor:
        """The features [..., D] of finished rows [..., Hv]; a projection may have a bias, or be an MLP."""
        self.require_token_features("this method")
        return cast(Tensor, self._tower.head(self._trunk.head(rows)))

    @property
    def _full(self) -> torch.dtype:
        """The type of the weights."""
        return torch.promote_types(self.dtype, torch.float32)

    def _rotation(self, layer: int) -> Rotation | None:
        """The rotary positions of the patches in block `layer`."""
        trunk = self._trunk
        if getattr(trunk, "rope", None) is None:
            return None
        half = bool(getattr(trunk.blocks[layer].attn, "rotate_half", False))
        return Rotation(partial(self._rotary_table, layer), int(trunk.num_prefix_tokens), half)

    def _rotary_table(self, layer: int) -> Tensor:
        """Sines and cosines of the patches [N, 2 d], or [heads, N, 2 d] where each block has its own."""
        rope = self._trunk.rope
        if self._trunk.dynamic_img_size or not hasattr(rope, "feat_shape"):
            table: Tensor = rope.get_embed(shape=self._trunk.patch_embed.grid_size)
        else:
            table = rope.get_embed()
        return table[layer] if self._trunk.rope_mixed else table
