"""open_clip's vision transformers: CLIP's, CLIPA's with averaged patches, CoCa's with attention pooling."""

from typing import Any, cast

import torch
from torch import Tensor

from maple.clip.edits import NO_EDIT, LayerEdit
from maple.clip.towers.base import ImageTower
from maple.clip.towers.blocks import Block
from maple.clip.towers.precision import convert_part, float32_norm


class OpenClipImageTower(ImageTower):
    """A vision transformer of open_clip's own; prompts are not among the rows that attention pooling reads.

    Source: open_clip 3.3.0 src/open_clip/transformer.py `VisionTransformer`.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model, dtype, None, [Block(module) for module in model.visual.transformer.resblocks])
        self._tower: Any = model.visual
        self.width = int(self._tower.conv1.weight.shape[0])
        self.pools_by_attention = self._tower.attn_pool is not None
        self.pools_class_token = not self.pools_by_attention and str(self._tower.pool_type) == "tok"

    def convert(self) -> None:
        """Convert the large weights to `dtype`; norms, and an attention pooling, stay in float32."""
        if self._tower.attn_pool is None:
            convert_part(self._tower, self.dtype)
        else:
            convert_part(self._tower.conv1, self.dtype)
            convert_part(self._tower.transformer, self.dtype)
            self._tower.ln_pre = float32_norm(self._tower.ln_pre)

    def plain(self, images: Tensor) -> Tensor:
        """The whole tower without prompts: images [B, 3, R, R] -> raw features [B, D]."""
        if self._tower.attn_pool is None:
            return self._encode(images.to(self.dtype))
        states = self.enter(self.embed(images))
        for layer in range(self.depth):
            states = self.block(layer, states)
        return self.finish(states)

    def embed(self, images: Tensor) -> Tensor:
        """Class token and N patches with positions, before the pre-norm: [B, 1 + N, Hv].

        Raises:
            ImageError: the images are not [B, 3, R, R].
        """
        self.check_images(images)
        tower = self._tower
        patches = tower.conv1(images.to(self.dtype)).flatten(2).transpose(1, 2)
        first = tower.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        positions: Tensor = tower.positional_embedding
        return torch.cat([first, patches], dim=1) + positions.to(patches.dtype)

    def enter(self, states: Tensor) -> Tensor:
        """The layer norm before the blocks: [B, n, Hv] -> [B, n, Hv]."""
        return cast(Tensor, self._tower.ln_pre(states))

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, *, first_row_only: bool = False) -> Tensor:
        """Block `layer`: [B, n, Hv] -> [B, n, Hv], or its class token alone, [B, 1, Hv]."""
        return self._blocks[layer].full(states, edit, first_row_only)

    def finish(self, states: Tensor) -> Tensor:
        """Pool, normalise and project the class token and patches [B, 1 + N, Hv], without prompts: [B, D].

        The class token alone, [B, 1, Hv], is enough if `pools_class_token`.
        """
        if self.pools_by_attention and states.dtype.itemsize <= 2:
            states = states.float()
        pooled: Tensor = self._tower._pool(states)[0]
        return pooled if self._tower.proj is None else pooled @ self._tower.proj

    def finish_tokens(self, states: Tensor) -> Tensor:
        """The final norm of rows [B, K, Hv] that are not pooled, without the projection: [B, K, Hv]."""
        self.require_token_features("this method")
        return cast(Tensor, self._tower.ln_post(states))

    def project(self, rows: Tensor) -> Tensor:
        """The features [..., D] of finished rows [..., Hv]."""
        self.require_token_features("this method")
        projection: Tensor | None = self._tower.proj
        return rows if projection is None else rows @ projection.to(rows.dtype)
