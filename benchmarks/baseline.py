"""MaPLe in the reference's way, kept plain: 77 tokens, stock attention modules, every class at every step, and text
again for every test batch.

Source: SPEC sections 2 and 3; muzairkhattak/multimodal-prompt-learning@69bce21 trainers/maple.py:40-204, clip/model.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maple.methods.maple import MaPLe


class PlainMaPLe:
    """The same parameters and the same open_clip model as `method`, run without any shortcut."""

    def __init__(self, method: MaPLe, full_ids: Tensor) -> None:
        self._method = method
        self._clip: Any = method.backbone.model
        self._ids = full_ids

    def text_features(self) -> Tensor:
        """Unit text features [C, D], all 77 tokens of every class."""
        clip, prompts = self._clip, self._method.text_prompts()
        length = prompts[0].shape[0]
        states = clip.token_embedding(self._ids)
        for layer, block in enumerate(clip.transformer.resblocks):
            if layer < len(prompts):
                tokens = prompts[layer].expand(len(states), -1, -1)
                states = torch.cat([states[:, :1], tokens, states[:, 1 + length :]], dim=1)
            if layer == 0:
                states = states + clip.positional_embedding
            states = block(states, attn_mask=clip.attn_mask)
        states = clip.ln_final(states)
        ends = states[torch.arange(len(states)), self._ids.argmax(dim=-1)]
        return F.normalize(ends @ clip.text_projection, dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit image features [B, D]."""
        visual, prompts = self._clip.visual, self._method.vision_prompts()
        length = prompts[0].shape[0]
        states = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(states), 1, -1)
        states = torch.cat([first, states], dim=1) + visual.positional_embedding
        states = torch.cat([states, prompts[0].expand(len(states), -1, -1)], dim=1)
        states = visual.ln_pre(states)
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(prompts):
                states = torch.cat([states[:, :-length], prompts[layer].expand(len(states), -1, -1)], dim=1)
            states = block(states)
        return F.normalize(visual.ln_post(states[:, 0]) @ visual.proj, dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C], text features computed afresh."""
        return self._method.backbone.logit_scale * self.image_features(images) @ self.text_features().T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(images), labels)
