"""What the towers of all families have in common; by itself, a tower that only runs whole."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from maple.clip.edits import NO_EDIT, Affine, LayerEdit
from maple.clip.towers.blocks import Block, Bucket, PrefixCache
from maple.errors import ImageError, UnsupportedTowerError


class Tower:
    """A frozen tower of a CLIP.

    Attributes:
        width: H, the channels of a token (0 if prompts cannot enter).
        depth: L, the number of blocks (0 if prompts cannot enter).
        obstacle: why prompts cannot enter, or None if they can.
        dtype: of the states between blocks.
    """

    kind: ClassVar[str]
    """The word for it in messages: text or image."""
    instead: ClassVar[str] = ""
    """What to do if prompts cannot enter, for messages."""

    def __init__(
        self, encode: Callable[[Tensor], Tensor], dtype: torch.dtype, obstacle: str | None, blocks: Sequence[Block] = ()
    ) -> None:
        self.dtype = dtype
        self.obstacle = obstacle
        self.width = 0
        self.depth = len(blocks)
        self._blocks = list(blocks)
        self._encode = encode

    def require_promptable(self, method: str) -> None:
        """Raise UnsupportedTowerError, which names `method`, if prompts cannot enter this tower."""
        if self.obstacle is not None:
            raise UnsupportedTowerError(
                f"{method} puts prompts into the {self.kind} tower, but {self.obstacle}{self.instead}"
            )

    def require_standard_blocks(self, method: str) -> None:
        """Raise UnsupportedTowerError if layers inside the blocks cannot be changed."""
        self.require_promptable(method)
        for number, block in enumerate(self._blocks):
            if not block.is_standard:
                raise UnsupportedTowerError(
                    f"{method} changes layers inside the blocks, but block {number} of this {self.kind} tower is not a "
                    f"standard CLIP attention block: it has {block.peculiarity}; use a backbone with standard blocks, "
                    "such as ViT-B-16"
                )

    def require_residuals(self, method: str) -> None:
        """Raise UnsupportedTowerError if adapters cannot be added to the blocks, for which the input needs a norm."""
        self.require_promptable(method)
        for number, block in enumerate(self._blocks):
            if block.first_norm is None:
                raise UnsupportedTowerError(
                    f"{method} adds adapters to the normed input of the blocks, but block {number} of this {self.kind} "
                    "tower does not begin with a norm of its input; use a backbone such as ViT-B-16"
                )

    def norms(self, layer: int) -> tuple[Affine, Affine]:
        """The affine parameters of a standard block's norms, before the attention and before the MLP."""
        return self._blocks[layer].norms

    def multiply_adds(self, layer: int, rows: int) -> int:
        """Multiply-adds of block `layer` on `rows` states, edits aside: products of weights and of attention."""
        return self._blocks[layer].multiply_adds(rows, self.width)

    def plain(self, inputs: Tensor) -> Tensor:
        """The whole tower without prompts: raw features [N, D] of its inputs."""
        with self.autocast(inputs.device.type):
            return self._encode(inputs)

    def convert(self) -> None:
        """Convert the large weights to `dtype`; norms stay in float32.

        Towers of other libraries than open_clip keep float32 weights, and run under autocast, as these expect.
        """

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """In which a tower of float32 weights computes in `dtype`."""
        return nullcontext() if self.dtype.itemsize > 2 else torch.autocast(device_type, self.dtype)


class TextTower(Tower):
    """The text tower of a CLIP: ids [C, T] to raw features [C, D].

    Attributes:
        context_length: the length of the longest sentence, special tokens included.
        is_causal: whether tokens attend only to those before them, so that a common prefix of sentences has the same
            states in all of them (`prefix` and `suffix`).
        reads_padding: whether what follows the end of a sentence changes its feature.

    Example:
        >>> clip.text.plain(clip.tokenize(["a photo of a cat."])).shape
        torch.Size([1, 512])
    """

    kind = "text"

    def __init__(
        self, model: Any, dtype: torch.dtype, obstacle: str | None = None, blocks: Sequence[Block] = ()
    ) -> None:
        super().__init__(model.encode_text, dtype, obstacle, blocks)
        tower = model if hasattr(model, "context_length") else model.text
        self.context_length = int(tower.context_length)
        self.is_causal = False
        self.reads_padding = True

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings of ids [C, T], without positions: [C, n, Ht], n = T, or T + 1 with a class token."""
        raise NotImplementedError

    def enter(self, states: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add positional embeddings to [..., n, Ht]: those of `positions` [n] or [C, n], by default of 0 to n - 1."""
        raise NotImplementedError

    def positions(self, ids: Tensor) -> Tensor | None:
        """The positions of ids [C, T] for `enter`, if they depend on these: [C, T] int64."""
        del ids
        return None

    def mask(self, ids: Tensor, inserted: int = 0) -> Tensor | None:
        """What `block` takes for the rows of a sentence: [C, 1, 1 or n, n] bool, which rows each row attends to.

        None for all, or those that causality permits. A tower may have numbers instead, which are added to scores.

        Args:
            inserted: rows that were inserted after the first one, and that all others attend to.
        """
        raise NotImplementedError

    @staticmethod
    def _with_inserted(attended: Tensor, inserted: int) -> Tensor:
        """Which rows [C, n] of sentences are attended to, and rows that are inserted after the first one."""
        entries = torch.ones_like(attended[:, :1]).expand(-1, inserted)
        return torch.cat([attended[:, :1], entries, attended[:, 1:]], dim=1)

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, mask: Tensor | None = None) -> Tensor:
        """Block `layer` on whole sentences, with what `mask` returned: [C, n, Ht] -> [C, n, Ht]."""
        raise NotImplementedError

    def prefix(
        self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, *, cache_only: bool = False
    ) -> tuple[PrefixCache, Tensor]:
        """Block `layer` of a causal tower on the common prefix of the sentences of each of G groups, [G, S, Ht].

        See `Block.prefix`.
        """
        return self._blocks[layer].prefix(states, self._causal_mask, edit, cache_only)

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
        """Block `layer` of a causal tower on packed sentence ends [R, Ht]: see `Block.suffix`."""
        return self._blocks[layer].suffix(cache, rows, buckets, self._causal_mask, edit, ends_only)

    def _causal_mask(self, length: int) -> Tensor:
        """The additive causal mask [length, length] of a causal tower."""
        raise NotImplementedError

    def pool(self, states: Tensor, ids: Tensor) -> Tensor:
        """The row that stands for each sentence, of its final states [C, n, Ht]: [C, Ht]."""
        ends = self.end_positions(ids)[:, None, None].expand(-1, 1, states.shape[-1])
        return states.gather(1, ends)[:, 0]

    def finish(self, rows: Tensor) -> Tensor:
        """Final norm and projection of pooled rows [C, Ht]: raw features [C, D]."""
        raise NotImplementedError

    def end_positions(self, ids: Tensor) -> Tensor:
        """The row of the last state that a feature needs, in each row of ids [C, T]: [C] int64."""
        raise NotImplementedError

    @property
    def embeddings(self) -> Tensor:
        """The table of token embeddings [V, Ht]."""
        raise NotImplementedError

    @property
    def vocabulary_size(self) -> int:
        """The number of token embeddings."""
        return len(self.embeddings)

    def token_embeddings(self, ids: Sequence[int]) -> Tensor:
        """Embeddings of n vocabulary ids, float32 without a gradient: [n, Ht]."""
        table = self.embeddings
        return table[torch.as_tensor(list(ids), device=table.device)].detach().float()


class ImageTower(Tower):
    """The image tower of a CLIP: images [B, 3, R, R] to raw features [B, D].

    Example:
        >>> clip.image.plain(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 512])
    """

    kind = "image"
    instead = "; use a ViT backbone, or a method without image prompts"

    pools_class_token = False
    """Whether features come from the first row alone, so that `finish` does not need the other rows."""
    pools_by_attention = False
    """Whether features come from an attention pooling, so that single rows have none."""
    first_patch = 1
    """The number of rows before the patches: class and register tokens."""

    def __init__(
        self, model: Any, dtype: torch.dtype, obstacle: str | None = None, blocks: Sequence[Block] = ()
    ) -> None:
        super().__init__(model.encode_image, dtype, obstacle, blocks)
        size = model.visual.image_size
        self.image_size: tuple[int, int] = tuple(size) if isinstance(size, Sequence) else (size, size)

    def embed(self, images: Tensor) -> Tensor:
        """Class and register tokens, if any, and N patches with positions, before the pre-norm: [B, n, Hv].

        Raises:
            ImageError: the images are not [B, 3, R, R].
        """
        raise NotImplementedError

    def check_images(self, images: Tensor) -> None:
        """Raise ImageError unless the images are [B, 3, R, R]."""
        # Under TorchScript's tracing, sizes are tensors, and a size that is compared becomes a constant.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        sides = self.image_size
        if not tracing and (images.ndim != 4 or images.shape[1:] != (3, *sides)):
            raise ImageError(
                f"got images of shape {list(images.shape)}; this CLIP reads [B, 3, {sides[0]}, {sides[1]}], resized "
                "and normalised as backbone.preprocessing describes"
            )

    def enter(self, states: Tensor) -> Tensor:
        """The layer norm before the blocks: [B, n, Hv] -> [B, n, Hv]."""
        raise NotImplementedError

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, *, first_row_only: bool = False) -> Tensor:
        """Block `layer`: [B, n, Hv] -> [B, n, Hv], or its class token alone, [B, 1, Hv]."""
        raise NotImplementedError

    def block_with_attention(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT) -> tuple[Tensor, Tensor]:
        """Block `layer` and its attention weights: [B, n, Hv] -> [B, n, Hv] and [B, heads, n, n]; differentiable.

        Raises:
            UnsupportedTowerError: it is not a standard attention block.
        """
        block = self._blocks[layer]
        if not block.is_standard:
            raise UnsupportedTowerError(
                f"block {layer} of this image tower is not a standard CLIP attention block: it has "
                f"{block.peculiarity}, so its attention cannot be read; use a backbone with standard blocks, such as "
                "ViT-B-16"
            )
        return block.full_with_attention(states, edit)

    def finish(self, states: Tensor) -> Tensor:
        """Pool, normalise and project the states that `embed` returned rows for, without prompts: [B, n, Hv] to [B, D].

        The first row alone, [B, 1, Hv], is enough if `pools_class_token`.
        """
        raise NotImplementedError

    def require_token_features(self, method: str) -> None:
        """Raise UnsupportedTowerError if single rows have no features by `finish_tokens` and `project`."""
        self.require_promptable(method)
        if self.pools_by_attention:
            raise UnsupportedTowerError(
                f"{method} needs features of single tokens, but the final norm and projection of this image tower "
                "follow its attention pooling, so that single tokens have no features; use a backbone such as "
                "ViT-B-16, or a method that learns prompts alone"
            )

    def finish_tokens(self, states: Tensor) -> Tensor:
        """The final norm of rows [B, K, Hv] that are not pooled, without the projection: [B, K, Hv].

        Raises:
            UnsupportedTowerError: features are not computed from single rows.
        """
        raise NotImplementedError

    def project(self, rows: Tensor) -> Tensor:
        """The features [..., D] of finished rows [..., Hv], or of their means.

        Raises:
            UnsupportedTowerError: features are not computed from single rows.
        """
        raise NotImplementedError
