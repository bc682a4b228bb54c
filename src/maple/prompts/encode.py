"""The one block loop, for text and for images: plain CLIP with prompt tokens put in at the entry of blocks."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from maple.clip import ImageTower, TextTower
from maple.errors import UnsupportedTowerError
from maple.prompts.splice import Sentences, append_vision, replace_vision


def encode_text(tower: TextTower, sentences: Sentences, prompts: Sequence[Tensor]) -> Tensor:
    """Raw text features [C, D] of sentences whose slots hold `prompts`, one tensor per prompted layer.

    What all sentences begin with (SOS, shared prompts, shared words) is computed once, and their ends attend to it;
    of the last block only the EOT rows are computed. Under a causal mask both change nothing but rounding.

    Args:
        prompts: J tensors [P, Ht]; or [C, P, Ht] with a prompt per sentence; or [G, 1, P, Ht], which gives the
            features of all sentences under each of G prompts: [G, C, D]. Layer k's enters block k.
    """
    groups = [prompt.shape[0] for prompt in prompts if prompt.ndim == 4]
    per_sentence = any(prompt.ndim == 3 for prompt in prompts)
    parts = sentences.parts(groups[0] if groups else 1, 1 if per_sentence else sentences.shared)
    prefix, suffix = tower.embed(parts.prefix_ids), tower.embed(parts.suffix_ids)
    for layer in range(tower.depth):
        if layer < len(prompts):
            prefix, suffix = parts.put(prefix, suffix, prompts[layer])
        if layer == 0:
            prefix, suffix = tower.enter(prefix), tower.enter(suffix, parts.shared)
        ends = parts.ends if layer == tower.depth - 1 else None
        prefix, suffix = tower.block_after_prefix(layer, prefix, suffix, ends)
    features = tower.finish(suffix[:, 0])
    return features.unflatten(0, (groups[0], -1)) if groups else features


def encode_image_with_attention(
    tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """As `encode_image`, and the attention of every block, [B, heads, n, n]; differentiable, and slower.

    Raises:
        UnsupportedTowerError: the tower has no blocks whose attention can be read.
    """
    if tower.obstacle is not None:
        raise UnsupportedTowerError(
            f"what attends to which part of an image cannot be read: {tower.obstacle}; heat maps need a CLIP with a "
            "vision transformer, such as ViT-B-16"
        )
    states = tower.embed(images)
    count = states.shape[1]
    seen = []
    for layer in range(tower.depth):
        states = _enter(tower, layer, states, prompts)
        states, attention = tower.block_with_attention(layer, states)
        seen.append(attention)
    return tower.finish(states[:, :count]), seen


def encode_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Raw image features [B, D] of images [B, 3, R, R] with `prompts`, J tensors [P, Hv]; none means plain CLIP."""
    if not prompts:
        return tower.plain(images)
    states = tower.embed(images)
    count = states.shape[1]
    for layer in range(tower.depth):
        states = _enter(tower, layer, states, prompts)
        last = layer == tower.depth - 1
        states = tower.block(layer, states, first_row_only=last and tower.reads_first_row)
    return tower.finish(states[:, :count])


def _enter(tower: ImageTower, layer: int, states: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """What block `layer` reads: the states, with that layer's prompts."""
    if layer == 0:
        return tower.enter(append_vision(states, prompts[0]) if prompts else states)
    return replace_vision(states, prompts[layer]) if layer < len(prompts) else states


def wide(features: Tensor) -> Tensor:
    """Features in float32 (in float64 where they are)."""
    return features if features.dtype.itemsize > 2 else features.float()


def unit(features: Tensor) -> Tensor:
    """L2-normalise features [..., D], in float32 (in float64 where they are)."""
    return F.normalize(wide(features), dim=-1)
