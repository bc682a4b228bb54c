"""open_clip's text transformers: CLIP's, SigLIP's and CLIPA's without a causal mask, CoCa's with a class token."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from maple.clip.edits import NO_EDIT, LayerEdit
from maple.clip.towers.base import TextTower
from maple.clip.towers.blocks import Block
from maple.clip.towers.precision import convert_part, float32_norm


class OpenClipTextTower(TextTower):
    """A text tower of open_clip's own.

    Features are read at the end of a sentence (CLIP), in the last row (SigLIP, CLIPA) or the first, or in the row of a
    class token (CoCa), which is appended to each sentence.

    Source: open_clip 3.3.0 src/open_clip/transformer.py `TextTransformer`.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        tower = getattr(model, "text", model)
        blocks = [Block(module) for module in tower.transformer.resblocks]
        self._pool_type = str(getattr(model, "text_pool_type", getattr(tower, "pool_type", "argmax")))
        self._class_token: Tensor | None = getattr(tower, "cls_emb", None)
        obstacle = None
        if self._pool_type == "none" and self._class_token is None:
            obstacle = "its text tower does not pool the states of a sentence"
        elif self._class_token is not None and not all(block.is_standard for block in blocks):
            obstacle = "its text tower masks padding (CoCa) in blocks that are not standard CLIP attention blocks"
        super().__init__(model, dtype, obstacle, blocks if obstacle is None else ())
        self._tower = tower
        self._eos_id = int(getattr(model, "text_eos_id", getattr(tower, "eos_id", None)) or 0)
        has_mask = tower.attn_mask is not None
        self.is_causal = has_mask and self._pool_type in ("argmax", "eos") and self._class_token is None
        self.reads_padding = not self.is_causal
        self.width = 0 if obstacle is not None else int(tower.token_embedding.weight.shape[1])

    def convert(self) -> None:
        """Convert the large weights to `dtype`; norms stay in float32."""
        tower = self._tower
        if self.dtype == torch.float32:
            return
        convert_part(tower.transformer, self.dtype)
        tower.ln_final = float32_norm(tower.ln_final)
        if self._class_token is not None:
            self._class_token.data = self._class_token.data.to(self.dtype)
        if isinstance(tower.text_projection, nn.Linear):
            tower.text_projection.to(self.dtype)
        elif tower.text_projection is not None:
            tower.text_projection.data = tower.text_projection.data.to(self.dtype)

    def plain(self, ids: Tensor) -> Tensor:
        """The whole tower without prompts: ids [C, T] -> raw features [C, D]."""
        return self._encode(ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings of ids [...], without positions: [..., Ht]; a class token is appended to [C, T]."""
        states = cast(Tensor, self._tower.token_embedding(ids)).to(self.dtype)
        if self._class_token is None:
            return states
        return torch.cat([states, self._class_token.expand(states.shape[0], 1, -1)], dim=1)

    def enter(self, states: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add positional embeddings to [..., n, Ht]: those of `positions` [n] int64, by default of 0 to n - 1."""
        table: Tensor = self._tower.positional_embedding
        chosen = table[: states.shape[-2]] if positions is None else table[positions]
        return states + chosen.to(states.dtype)

    def mask(self, ids: Tensor, inserted: int = 0) -> Tensor | None:
        """Which rows each row attends to where CoCa hides padding, causality included: [C, 1, n, n] bool."""
        if self._class_token is None:
            return None
        # CoCa's published weights were trained with the entry of the class token in front: shifted by one.
        allowed, entry = ids != self._tower.pad_id, torch.ones_like(ids[:, :1], dtype=torch.bool)
        allowed = torch.cat([allowed, entry] if self._tower.correct_cls_mask else [entry, allowed], dim=1)
        allowed = self._with_inserted(allowed, inserted)
        length = allowed.shape[1]
        return allowed[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, mask: Tensor | None = None) -> Tensor:
        """Block `layer` on whole sentences: [C, n, Ht] -> [C, n, Ht]; n may exceed the context length."""
        if mask is None and self._tower.attn_mask is not None:
            return self._blocks[layer].causal(states, self._causal_mask, edit)
        return self._blocks[layer].full(states, edit, mask=mask)

    def _causal_mask(self, length: int) -> Tensor:
        mask: Tensor = self._tower.attn_mask
        if length <= len(mask):
            return mask[:length, :length]
        return mask.new_full((length, length), -torch.inf).triu(1)  # tokens make sentences longer than the context

    def finish(self, rows: Tensor) -> Tensor:
        """Final norm and projection of pooled rows [C, Ht]: raw features [C, D]."""
        rows = self._tower.ln_final(rows)
        projection = self._tower.text_projection
        if projection is None:
            return rows
        return cast(Tensor, projection(rows) if isinstance(projection, nn.Linear) else rows @ projection)

    def end_positions(self, ids: Tensor) -> Tensor:
        """The row whose state is the feature, in each row of ids [C, T]: [C] int64."""
        if self._class_token is not None:
            return torch.full_like(ids[:, 0], ids.shape[1])
        if self._pool_type == "last":
            return torch.full_like(ids[:, 0], ids.shape[1] - 1)
        if self._pool_type == "first":
            return torch.zeros_like(ids[:, 0])
        if self._pool_type == "eos":
            return torch.eq(ids, self._eos_id).int().argmax(dim=-1)
        return ids.argmax(dim=-1)

    @property
    def embeddings(self) -> Tensor:
        """The table of token embeddings [V, Ht]."""
        return cast(Tensor, self._tower.token_embedding.weight)
