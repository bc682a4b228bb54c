"""MaPLe, CoCoOp and CLIP-LoRA computed as the published code does: 77 tokens, every class at every step, text features
for every test batch, and CoCoOp's images one by one.

Source: SPEC sections 2 and 3; muzairkhattak/multimodal-prompt-learning@69bce21 trainers/maple.py:40-204, clip/model.py;
KaiyangZhou/CoOp@ff61507 trainers/cocoop.py:142-190.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maple.methods.clip_lora import CLIPLoRA
from maple.methods.cocoop import CoCoOp
from maple.methods.maple import MaPLe


class PlainText:
    """The text tower of an open_clip model, all 77 tokens of every class."""

    def __init__(self, clip: Any, full_ids: Tensor, dtype: torch.dtype) -> None:
        self._clip = clip
        self._dtype = dtype
        self._ids = full_ids

    def features(self, prompts: Sequence[Tensor]) -> Tensor:
        """Unit text features [C, D] with `prompts`, [P, Ht] per layer, after SOS."""
        clip = self._clip
        length = prompts[0].shape[0]
        states = clip.token_embedding(self._ids).to(self._dtype)
        for layer, block in enumerate(clip.transformer.resblocks):
            if layer < len(prompts):
                tokens = prompts[layer].to(states.dtype).expand(len(states), -1, -1)
                states = torch.cat([states[:, :1], tokens, states[:, 1 + length :]], dim=1)
            if layer == 0:
                states = states + clip.positional_embedding.to(states.dtype)
            states = block(states, attn_mask=clip.attn_mask.to(states.dtype))
        states = clip.ln_final(states)
        ends = states[torch.arange(len(states)), self._ids.argmax(dim=-1)]
        return F.normalize((ends @ clip.text_projection).float(), dim=-1)


class PlainMaPLe:
    """The same parameters and the same open_clip model as `method`, computed without any shortcut."""

    def __init__(self, method: MaPLe, full_ids: Tensor) -> None:
        self._method = method
        self._clip: Any = method.backbone.model
        self._text = PlainText(self._clip, full_ids, method.backbone.dtype)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit image features [B, D]."""
        visual, prompts = self._clip.visual, self._method.vision_prompts()
        length = prompts[0].shape[0]
        states = visual.conv1(images.to(self._method.backbone.dtype)).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(states.dtype).expand(len(states), 1, -1)
        states = torch.cat([first, states], dim=1) + visual.positional_embedding.to(states.dtype)
        tokens = [prompt.to(states.dtype).expand(len(states), -1, -1) for prompt in prompts]
        states = visual.ln_pre(torch.cat([states, tokens[0]], dim=1))
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(prompts):
                states = torch.cat([states[:, :-length], tokens[layer]], dim=1)
            states = block(states)
        return F.normalize((visual.ln_post(states[:, 0]) @ visual.proj).float(), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C], text features computed afresh."""
        text = self._text.features(self._method.text_prompts())
        return self._method.backbone.logit_scale * self.image_features(images) @ text.T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(images), labels)


class PlainCoCoOp:
    """The same parameters and the same open_clip model as `method`; all classes for every image, in a loop."""

    def __init__(self, method: CoCoOp, full_ids: Tensor) -> None:
        self._method = method
        self._text = PlainText(method.backbone.model, full_ids, method.backbone.dtype)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        method = self._method
        rows = []
        for feature in method.encode_images(images):
            shift = method.meta_net[1](torch.relu(method.meta_net[0](feature)))
            text = self._text.features([method.text_prompts()[0] + shift])
            rows.append(method.backbone.logit_scale * feature @ text.T)
        return torch.stack(rows)


class PlainCLIPLoRA:
    """The same parameters and the same open_clip model as `method`, 77 tokens of every class, every row computed."""

    def __init__(self, method: CLIPLoRA, full_ids: Tensor) -> None:
        self._method = method
        self._clip: Any = method.backbone.model
        self._ids = full_ids

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy; in training, each update drops a part of its input."""
        clip, visual = self._clip, self._clip.visual
        states = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(states), 1, -1)
        states = visual.ln_pre(torch.cat([first, states], dim=1) + visual.positional_embedding)
        for layer, block in enumerate(visual.transformer.resblocks):
            states = self._block(block, "vision", layer, states, causal=False)
        image = F.normalize(visual.ln_post(states[:, 0]) @ visual.proj, dim=-1)
        states = clip.token_embedding(self._ids) + clip.positional_embedding
        for layer, block in enumerate(clip.transformer.resblocks):
            states = self._block(block, "text", layer, states, causal=True)
        ends = clip.ln_final(states)[torch.arange(len(states)), self._ids.argmax(dim=-1)]
        text = F.normalize(ends @ clip.text_projection, dim=-1)
        return F.cross_entropy(self._method.logit_scale * image @ text.T, labels)

    def _block(self, block: Any, tower: str, layer: int, states: Tensor, *, causal: bool) -> Tensor:
        attention, normed = block.attn, block.ln_1(states)
        updates: Any = self._method.lora[tower]
        parts = []
        for kind, weight, bias in zip(
            "qkv", attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        ):
            factors, dropped = updates[str(layer)][kind], F.dropout(normed, updates.dropout, self._method.training)
            update = updates.scale * dropped @ factors["down"].T @ factors["up"].T
            part = F.linear(normed, weight, bias) + update
            parts.append(part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
        attended = F.scaled_dot_product_attention(*parts, is_causal=causal).transpose(1, 2).flatten(2)
        states = states + attention.out_proj(attended)
        return states + block.mlp(block.ln_2(states))  # type: ignore[no-any-return]
