"""CLIP's two towers, split into the stages between which prompts enter.

A tower runs as `embed -> enter -> block 0 .. block L-1 -> finish`. The published prompt learners patched a fork of CLIP
for this; here the stages are those of an unmodified open_clip model, and this file is the only one that knows its
attributes. Towers without such stages (ResNets, timm, text towers with their own pooling token) run through `plain`.

Source: CLIP (Radford et al., 2021), section 2.4; muzairkhattak/multimodal-prompt-learning@69bce21
clip/model.py:313-328 and 452-463 for where prompts enter.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from maple.clip.blocks import Block, Bucket, PrefixCache
from maple.clip.edits import NO_EDIT, Affine, LayerEdit
from maple.errors import ImageError, UnsupportedTowerError


class TextTower:
    """The text tower of a CLIP: ids [C, T] to raw features [C, D].

    Attributes:
        width: Ht, the channels of a text token (0 if prompts cannot enter).
        depth: L, the number of blocks (0 if prompts cannot enter).
        context_length: the length of the longest sentence, including SOS and EOT.
        obstacle: why prompts cannot enter, or None if they can.

    Example:
        >>> clip.text.plain(clip.tokenize(["a photo of a cat."])).shape
        torch.Size([1, 512])
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        tower = getattr(model, "text", model)
        self.dtype = dtype
        self.encode: Callable[[Tensor], Tensor] = model.encode_text
        self.obstacle = _text_obstacle(model, tower)
        self.context_length = int(model.context_length if hasattr(model, "context_length") else tower.context_length)
        if self.obstacle is not None:
            self.width = self.depth = 0
            return
        self._tower = tower
        self._pool_type = str(getattr(model, "text_pool_type", getattr(tower, "pool_type", "argmax")))
        self._eos_id = int(getattr(model, "text_eos_id", getattr(tower, "eos_id", None)) or 0)
        self._blocks = [Block(module) for module in tower.transformer.resblocks]
        self.width = int(tower.token_embedding.weight.shape[1])
        self.depth = len(self._blocks)

    def require_promptable(self, method: str) -> None:
        """Raise UnsupportedTowerError, which names `method`, if prompts cannot enter this tower."""
        if self.obstacle is not None:
            raise UnsupportedTowerError(f"{method} puts prompts into the text tower, but {self.obstacle}")

    def require_standard_blocks(self, method: str) -> None:
        """Raise UnsupportedTowerError if layers inside the blocks cannot be changed."""
        self.require_promptable(method)
        _require_standard(self._blocks, "text", method)

    def norms(self, layer: int) -> tuple[Affine, Affine]:
        """The affine parameters of a standard block's norms, before the attention and before the MLP."""
        return self._blocks[layer].norms

    def plain(self, ids: Tensor) -> Tensor:
        """The whole tower without prompts: ids [C, T] -> raw features [C, D]."""
        return self.encode(ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings of ids [...], without positions: [..., Ht]."""
        return cast(Tensor, self._tower.token_embedding(ids)).to(self.dtype)

    def enter(self, states: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add positional embeddings to [..., T, Ht]: those of `positions` [T] int64, by default of 0 to T - 1."""
        table: Tensor = self._tower.positional_embedding
        chosen = table[: states.shape[-2]] if positions is None else table[positions]
        return states + chosen.to(states.dtype)

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT) -> Tensor:
        """Block `layer` under the causal mask: [C, n, Ht] -> [C, n, Ht]; n may exceed the context length."""
        return self._blocks[layer].causal(states, self._mask, edit)

    def prefix(
        self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, *, cache_only: bool = False
    ) -> tuple[PrefixCache, Tensor]:
        """Block `layer` on the common prefix of the sentences of each of G groups, [G, S, Ht]: see `Block.prefix`."""
        return self._blocks[layer].prefix(states, self._mask, edit, cache_only)

    def suffix(
        self,
        layer: int,
        cache: PrefixCache,
        rows: Tensor,
        buckets: Sequence[Bucket],
        edit: LayerEdit = NO_EDIT,
        *,
        ends_only: bool = False,
    ) -> Tensor:
        """Block `layer` on packed sentence ends [R, Ht]: see `Block.suffix`."""
        return self._blocks[layer].suffix(cache, rows, buckets, self._mask, edit, ends_only)

    def _mask(self, length: int) -> Tensor:
        mask: Tensor = self._tower.attn_mask
        if length <= len(mask):
            return mask[:length, :length]
        return mask.new_full((length, length), -torch.inf).triu(1)  # tokens make sentences longer than the context

    def finish(self, states: Tensor) -> Tensor:
        """Final norm and projection of the EOT states [C, Ht]: raw features [C, D]."""
        states = self._tower.ln_final(states)
        projection = self._tower.text_projection
        if projection is None:
            return states
        return cast(Tensor, projection(states) if isinstance(projection, nn.Linear) else states @ projection)

    def end_positions(self, ids: Tensor) -> Tensor:
        """The position of the EOT token, whose state is the feature, in each row of ids [C, T]: [C] int64."""
        if self._pool_type == "eos":
            return torch.eq(ids, self._eos_id).int().argmax(dim=-1)
        return ids.argmax(dim=-1)

    @property
    def vocabulary_size(self) -> int:
        """The number of token embeddings."""
        return len(self._tower.token_embedding.weight)

    def token_embeddings(self, ids: Sequence[int]) -> Tensor:
        """Embeddings of n vocabulary ids, float32 without a gradient: [n, Ht]."""
        table = self._tower.token_embedding.weight
        return cast(Tensor, table[torch.as_tensor(list(ids), device=table.device)]).detach().float()


class ImageTower:
    """The image tower of a CLIP: images [B, 3, R, R] to raw features [B, D].

    Attributes:
        width: Hv, the channels of a visual token (0 if prompts cannot enter).
        depth, obstacle: as for `TextTower`.

    Example:
        >>> clip.image.plain(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 512])
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.encode: Callable[[Tensor], Tensor] = model.encode_image
        self._tower: Any = model.visual
        self.obstacle: str | None = None
        if not isinstance(self._tower, VisionTransformer):
            self.obstacle = f"its image tower is a {type(self._tower).__name__}, not a CLIP vision transformer"
        elif self._tower.attn_pool is not None:
            self.obstacle = "its image tower pools by attention over all tokens (CoCa)"
        self._blocks = [] if self.obstacle is not None else [Block(m) for m in self._tower.transformer.resblocks]
        self.width = 0 if self.obstacle is not None else int(self._tower.conv1.weight.shape[0])
        self.depth = len(self._blocks)

    def require_promptable(self, method: str) -> None:
        """Raise UnsupportedTowerError, which names `method`, if prompts cannot enter this tower."""
        if self.obstacle is not None:
            raise UnsupportedTowerError(
                f"{method} puts prompts into the image tower, but {self.obstacle}; use a ViT backbone, or a method "
                "without image prompts"
            )

    def require_standard_blocks(self, method: str) -> None:
        """Raise UnsupportedTowerError if layers inside the blocks cannot be changed."""
        self.require_promptable(method)
        _require_standard(self._blocks, "image", method)

    def norms(self, layer: int) -> tuple[Affine, Affine]:
        """The affine parameters of a standard block's norms, before the attention and before the MLP."""
        return self._blocks[layer].norms

    def plain(self, images: Tensor) -> Tensor:
        """The whole tower without prompts: images [B, 3, R, R] -> raw features [B, D]."""
        return self.encode(images if self.obstacle is not None else images.to(self.dtype))

    def embed(self, images: Tensor) -> Tensor:
        """Class token and N patches with positions, before the pre-norm: [B, 1 + N, Hv].

        Raises:
            ImageError: the images are not [B, 3, R, R].
        """
        tower = self._tower
        sides = tuple(tower.image_size)
        # Under TorchScript's tracing, sizes are tensors, and a size that is compared becomes a constant.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not tracing and (images.ndim != 4 or images.shape[1:] != (3, *sides)):
            raise ImageError(
                f"got images of shape {list(images.shape)}; this CLIP reads [B, 3, {sides[0]}, {sides[1]}], resized "
                "and normalised as backbone.preprocessing describes"
            )
        patches = tower.conv1(images.to(self.dtype)).flatten(2).transpose(1, 2)
        first = tower.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        positions: Tensor = tower.positional_embedding
        return torch.cat([first, patches], dim=1) + positions.to(patches.dtype)

    def enter(self, states: Tensor) -> Tensor:
        """The layer norm before the blocks: [B, n, Hv] -> [B, n, Hv]."""
        return cast(Tensor, self._tower.ln_pre(states))

    @property
    def pools_class_token(self) -> bool:
        """Whether features come from the class token alone, so that `finish` does not need the other rows."""
        return str(self._tower.pool_type) == "tok"

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, *, first_row_only: bool = False) -> Tensor:
        """Block `layer`: [B, n, Hv] -> [B, n, Hv], or its class token alone, [B, 1, Hv]."""
        return self._blocks[layer].full(states, edit, first_row_only)

    def block_with_attention(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT) -> tuple[Tensor, Tensor]:
        """Block `layer` and its attention weights: [B, n, Hv] -> [B, n, Hv] and [B, heads, n, n]; differentiable.

        Raises:
            UnsupportedTowerError: it is not a standard attention block.
        """
        if not self._blocks[layer].is_standard:
            raise UnsupportedTowerError(
                f"block {layer} of this image tower is not a standard CLIP attention block, so its attention cannot be "
                "read; use a backbone with standard blocks, such as ViT-B-16"
            )
        return self._blocks[layer].full_with_attention(states, edit)

    def finish(self, states: Tensor) -> Tensor:
        """Pool, normalise and project the class token and patches [B, 1 + N, Hv], without prompts: [B, D].

        The class token alone, [B, 1, Hv], is enough if `pools_class_token`.
        """
        pooled: Tensor = self._tower._pool(states)[0]
        return pooled if self._tower.proj is None else pooled @ self._tower.proj

    @property
    def projection(self) -> Tensor:
        """From final states to features: [Hv, D]; the identity where there is none."""
        projection: Tensor | None = self._tower.proj
        return torch.eye(self.width, device=self._tower.conv1.weight.device) if projection is None else projection

    def finish_tokens(self, states: Tensor) -> Tensor:
        """The final norm of rows [B, K, Hv] that are not pooled, without the projection: [B, K, Hv]."""
        return cast(Tensor, self._tower.ln_post(states))


def _require_standard(blocks: Sequence[Block], tower: str, method: str) -> None:
    for number, block in enumerate(blocks):
        if not block.is_standard:
            raise UnsupportedTowerError(
                f"{method} changes layers inside the blocks, but block {number} of this {tower} tower is not a "
                "standard CLIP attention block; use a backbone with standard blocks, such as ViT-B-16"
            )


def _text_obstacle(model: Any, tower: Any) -> str | None:
    if tower is not model and not isinstance(tower, TextTransformer):
        return f"its text tower is a {type(tower).__name__}, which is not an open_clip text transformer"
    if getattr(tower, "cls_emb", None) is not None:
        return "its text tower reads an extra class token (CoCa), not the EOT token"
    if tower.attn_mask is None:
        return "its text tower is not causal"
    pool_type = getattr(model, "text_pool_type", getattr(tower, "pool_type", "argmax"))
    if pool_type not in ("argmax", "eos"):
        return f"its text tower pools by {pool_type!r}, not at the EOT token"
    return None
